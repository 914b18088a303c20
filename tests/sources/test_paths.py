"""A path that cannot be used is told by what it is; every model source has a name for folders."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import pytest

from claq_exp.config import ModelConfig, TaskConfig
from claq_exp.errors import ClaqError, ConfigError, SourceError
from claq_exp.evaluation.rows import read_rows
from claq_exp.evaluation.tasks import local_file
from claq_exp.models.source import NAME, ModelSource, model_folder, source_name
from claq_exp.sources.text import TextSource, text_files


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with a text, a folder, and a link that leads nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # nothing here is asked of it
    (tmp_path / "words.txt").write_text("the cat", encoding="utf-8")
    (tmp_path / "many" / ".git").mkdir(parents=True)
    for name in ("many/a.txt", "many/b.txt", "many/.git/c.parquet", "many/d.pdf"):
        (tmp_path / name).write_text("the cat", encoding="utf-8")
    (tmp_path / "lost").symlink_to("/nowhere/at/all")
    return tmp_path


PATHS = [
    ("many", "'many' is a folder, with 2 .txt, 1 .pdf; give one file, or which of them as files"),
    ("lost", "'lost' is a link to '/nowhere/at/all', which does not exist"),
    ("words.txt ", "'words.txt ' has a space at its end or start"),
    ("word.txt", "'word.txt' does not exist (looked in {cwd}); in {cwd} there is 'words.txt'"),
    ("other", "'other' does not exist (looked in {cwd})"),
    ("words.txt/x", "does not exist: {cwd}/words.txt is a file"),
    ("many/*.txt", "give their folder as path, and the pattern as files"),
    ("x" * 300, "cannot be looked at: File name too long"),
    ("~no_such_person/a", "cannot be looked at: Could not determine home directory"),
    ("C:\\texts\\a.txt", "is a path of Windows"),
    ("file:///tmp/a.txt", "is an address; give the path alone: /tmp/a.txt"),
    ("https://example.org/a.txt", "is an address; fetch the file, and give its path"),
    (
        "https://huggingface.co/datasets/allenai/c4/tree/main",
        "is an address; give its name on the hub as source: allenai/c4",
    ),
    ("wheel://a==1/b.txt", "is an address; give it as source, with its sha256"),
]


@pytest.mark.case(132, 133)
@pytest.mark.parametrize(("given", "words"), PATHS, ids=[given[:20] for given, _ in PATHS])
def test_a_text_that_cannot_be_used_is_one_true_line(given, words, place):
    with pytest.raises(ConfigError) as caught:
        text_files(TextSource(path=given))
    assert words.format(cwd=place) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.case(132, 133)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("many", "data 'many' is a folder; give a file of rows"),
        ("lost", "data 'lost' is a link to '/nowhere/at/all'"),
        ("word.txt", "data 'word.txt' does not exist (looked in {cwd}); in {cwd} there is"),
        ("words.txt", "data must be one of .jsonl, "),
    ],
)
def test_task_rows_that_cannot_be_used_are_one_true_line(given, words, place):
    with pytest.raises(ConfigError) as caught:
        local_file("piqa", "data", TaskConfig(data=given))
    assert f"evaluation.zero_shot.piqa.{words.format(cwd=place)}" in str(caught.value)


MODELS = [
    ("many", "model folder 'many' has no config.json"),
    ("above", "model folder 'above' has no config.json; above/tiny has one"),
    ("lost", "'lost' is a link to '/nowhere/at/all', which does not exist"),
    ("words.txt", "'words.txt' is a file and no GGUF; give the folder that holds config.json"),
    ("above/tiny/config.json", "is a file and no GGUF; give the folder"),
    ("above/tiny ", "has a space at its end or start"),
    ("./abov", "'./abov' does not exist (looked in {cwd}); in {cwd} there is 'above'"),
    ("some/Llama 2", "'some/Llama 2' does not exist (looked in {cwd})"),
    ("C:\\models\\llama", "is a path of Windows"),
    ("x" * 300, "cannot be looked at: File name too long"),
    ("https://huggingface.co/gpt2", "give its name on the hub as source: gpt2"),
]


@pytest.mark.case(133)
@pytest.mark.parametrize(("given", "words"), MODELS, ids=[given[:20] for given, _ in MODELS])
def test_a_model_that_cannot_be_used_is_one_true_line(given, words, place, tiny_model):
    (place / "above" / "tiny").mkdir(parents=True)
    shutil.copy(tiny_model / "config.json", place / "above" / "tiny")
    with pytest.raises(ClaqError) as caught:
        model_folder(ModelSource(given))
    assert words.format(cwd=place) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.case(133)
def test_a_name_for_the_hub_says_that_there_is_no_such_folder(place, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(ClaqError, match=rf"\(and no folder of that name in {place}\), and"):
        model_folder(ModelSource("tiny"))


ODD = ["模型", "モデル", "my model!", "é" * 90, "x" * 240, "-dash", "...", "_", "!", "/", "模型/"]


@pytest.mark.case(131)
@pytest.mark.parametrize("source", [*ODD, ".", "..", "~", "C:\\models\\llama", " ", "🦙/🦙"])
def test_every_source_has_a_name_for_folders(source):
    assert NAME.fullmatch(ModelConfig(source=source).name)


@pytest.mark.case(131)
def test_plain_sources_keep_their_names_and_odd_ones_do_not_collide(tmp_path, monkeypatch):
    plain = {
        "meta-llama/Llama-2-7b-hf": "Llama-2-7b-hf",
        "models/tiny/": "tiny",
        "wheel://a==1/b/c.Q4_1.gguf": "c.Q4_1.gguf",
        "my model": "my_model",
    }
    assert {source: source_name(source) for source in plain} == plain
    assert len({source_name(source) for source in ODD}) == len(ODD) - 1  # 模型 with and without /
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path / "tiny")
    assert source_name(".") == source_name("./") == "tiny"
    assert source_name("..") == source_name(str(tmp_path))


@pytest.mark.case(131)
def test_a_name_that_was_given_is_held_to_what_folders_allow():
    for name in ("模型", "x" * 101, "a/b", "-a"):
        with pytest.raises(ConfigError, match=r"up to 100 letters, digits.*begin with"):
            ModelConfig(source="a", name=name)


@pytest.mark.case(123, 126)
def test_task_rows_are_read_by_the_same_rule_as_texts(tmp_path):
    rows = [{"goal": "a", "label": 0}, {"goal": "b", "label": 1}]
    content = b'{"goal": "a", "label": 0}\n{"goal": "b", "label": 1}\n'
    files = {
        "rows.JSONL.xz": lzma.compress(content),
        "mark.json": content.decode().encode("utf-16"),
        "rows.csv": b"goal,label\na,0\nb,1\n",
    }
    for name, written in files.items():
        (tmp_path / name).write_bytes(written)
        assert read_rows(tmp_path / name, {}).to_list() == rows
    refused = {
        "zip.jsonl": (b"PK\3\4" + content, "is a zip archive"),
        "latin.jsonl": (content * 99 + b'{"goal": "\xe9", "label": 0}', "1 characters that are no"),
        "cut.jsonl.gz": (b"\x1f\x8b\x08" + content, "is no whole gzip file"),
    }
    for name, (written, words) in refused.items():
        (tmp_path / name).write_bytes(written)
        with pytest.raises(SourceError, match=words):
            read_rows(tmp_path / name, {})
