"""A text is the same in every kind of file; what is wrong with a file is said with its place."""

from __future__ import annotations

import gzip
import json

import pytest
from conftest import byte_tokenizer

from claq_exp.calibration.windows import first_windows, sample_windows
from claq_exp.errors import ConfigError, SourceError
from claq_exp.models.load import tokenize
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.text import TextSource, read_text, text_file

TEXT = "the small cat\nsees the héron\n"
DOCUMENTS = ["the cat", "a\nbig dog", 'says "so" \\ then']


def jsonl(documents: list[str], field: str = "text", *, ascii_only: bool = True) -> bytes:
    lines = [json.dumps({field: text}, ensure_ascii=ascii_only) for text in documents]
    return "".join(line + "\n" for line in lines).encode()


@pytest.fixture
def source(tmp_path):
    def write(name: str, content: bytes, **options: object) -> TextSource:
        (tmp_path / name).write_bytes(content)
        return TextSource(str(tmp_path / name), **options)

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", TEXT.encode()),
        ("no_suffix", TEXT.encode()),
        ("packed.txt.gz", gzip.compress(TEXT.encode())),
        ("windows.txt", TEXT.replace("\n", "\r\n").encode()),
        ("mark.txt", b"\xef\xbb\xbf" + TEXT.encode()),
        (
            "mark_windows.txt.gz",
            gzip.compress(b"\xef\xbb\xbf" + TEXT.encode().replace(b"\n", b"\r\n")),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_of_a_plain_file_gives_the_same_text(name, content, source):
    assert read_text(source(name, content)) == TEXT


def test_bytes_that_are_no_utf8_are_replaced_and_the_rest_is_kept(source):
    assert read_text(source("latin.txt", b"caf\xe9 and tea")) == "caf� and tea"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(DOCUMENTS)),
        ("rows.jsonl.gz", gzip.compress(jsonl(DOCUMENTS))),
        ("windows.jsonl", jsonl(DOCUMENTS).replace(b"\n", b"\r\n")),
        ("blank_lines.jsonl", b"\n" + jsonl(DOCUMENTS).replace(b"\n", b"\n\n")),
        ("no_last_newline.jsonl", jsonl(DOCUMENTS).rstrip(b"\n")),
        ("mark.jsonl", b"\xef\xbb\xbf" + jsonl(DOCUMENTS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_of_a_jsonl_file_gives_the_joined_documents(name, content, source):
    assert read_text(source(name, content)) == "\n\n".join(DOCUMENTS)


def test_field_and_join_of_a_jsonl_file_are_the_configs(source):
    text = source("rows.jsonl", jsonl(DOCUMENTS, "body"), field="body", join=" | ")
    assert read_text(text) == " | ".join(DOCUMENTS)


@pytest.mark.parametrize("odd", ["\u2028", "\x85"], ids=ascii)
def test_only_a_newline_ends_a_line_of_jsonl(odd, source):
    documents = [f"one{odd}two", "three"]
    assert read_text(source("rows.jsonl", jsonl(documents, ascii_only=False))) == (
        f"one{odd}two\n\nthree"
    )


@pytest.mark.parametrize(
    "line",
    [b'{"text": "cut', b'["a list"]', b'"a string"', b'{"body": "another field"}', b"5"],
    ids=bytes.decode,
)
def test_a_broken_line_of_jsonl_is_named_with_file_and_number(line, source):
    text = source("rows.jsonl", jsonl(DOCUMENTS[:1]) + b"\n" + line + b"\n")
    with pytest.raises(SourceError) as caught:
        read_text(text)
    assert f"{text.source} line 3: no JSON object with field 'text'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_document_without_text_does_not_become_the_word_none(source):
    text = source("rows.jsonl", b'{"text": "a"}\n{"text": null}\n')
    with pytest.raises(SourceError, match="line 2"):
        read_text(text)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(TEXT.encode() * 99)[:30]], ids=["other", "cut short"]
)
def test_a_damaged_gz_file_is_named(content, source):
    text = source("text.txt.gz", content)
    with pytest.raises(SourceError, match=r"text\.txt\.gz"):
        read_text(text)


def test_a_pinned_content_is_checked(source, tmp_path):
    text = source("plain.txt", TEXT.encode())
    right = sha256_of(tmp_path / "plain.txt")
    assert text_file(TextSource(text.source, sha256=right)) == tmp_path / "plain.txt"
    with pytest.raises(SourceError, match=right):
        text_file(TextSource(text.source, sha256="0" * 64))


def test_a_missing_file_is_told_from_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("nothing.txt", "./nothing", "/nothing/at/all", "~/nothing"):
        with pytest.raises(ConfigError, match=r"does not exist \(looked in "):
            text_file(TextSource(source))
    assert text_file(TextSource("owner/data_set")) is None
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "data_set").write_text(TEXT, encoding="utf-8")
    assert read_text(TextSource("owner/data_set")) == TEXT


def test_a_data_set_that_the_hub_does_not_give_is_one_line(monkeypatch):
    import datasets

    def fail(*args, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        SourceError, match=r"'owner/data_set'.*no route; give a local file"
    ) as caught:
        read_text(TextSource("owner/data_set", subset="en"))
    assert "\n" not in str(caught.value)


def test_documents_of_a_data_set_are_joined_and_a_wrong_field_names_the_others(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"body": DOCUMENTS})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    assert read_text(TextSource("some/set", field="body")) == "\n\n".join(DOCUMENTS)
    with pytest.raises(ConfigError, match="no field 'text'; it has: body"):
        read_text(TextSource("some/set"))


def test_windows_do_not_overlap_and_follow_the_seed():
    tokens = tokenize(byte_tokenizer(), "".join(chr(97 + i % 26) for i in range(1003)))
    first = first_windows(tokens, None, 10, "here")
    assert first.flatten().tolist() == tokens[:1000].tolist()
    assert first_windows(tokens, 3, 10, "here").tolist() == first[:3].tolist()
    drawn = sample_windows(
        tokens + 1000 * (tokens.new_tensor(range(1003)) // 10), 50, 10, 4, "here"
    )
    numbers = (drawn // 1000)[:, 0].tolist()
    assert len(set(numbers)) == 50
    again = sample_windows(tokens, 50, 10, 4, "here")
    assert again.tolist() == [first[number].tolist() for number in numbers]
    other = sample_windows(tokens, 50, 10, 5, "here")
    assert other.tolist() != again.tolist()
    with pytest.raises(
        ConfigError, match=r"here: the text has 1003 tokens, i.e. 100 windows of 10"
    ):
        sample_windows(tokens, 101, 10, 0, "here")
