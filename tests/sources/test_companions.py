"""Tokenizer, processors, templates and terms go with the model; weights and training do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from conftest import byte_tokenizer
from tiny_towers import IMAGE, TOWERS
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaProcessor,
)

from claq_exp.checkpoint.manifest import check_harmless, check_manifest
from claq_exp.checkpoint.reader import load_model
from claq_exp.compose.experiment import compose_config
from claq_exp.export.dense import write_dense
from claq_exp.models.source import ModelSource, fingerprint, model_folder
from claq_exp.run import runner
from claq_exp.sources.companions import Companions
from claq_exp.sources.pickled import copy_descriptions

pytestmark = pytest.mark.case(118)

ImageProcessor = getattr(  # that needs no torchvision; transformers 5.0 has it under the other name
    transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor
)

BELONG = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json"),
    *("qwen.tiktoken", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "chat_template.json", "chat_template.jinja"),
    *("additional_chat_templates/tools.jinja", "generation_config.json", "LICENSE", "NOTICE.txt"),
    "USE_POLICY.md",
]
STAY = [
    *("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "training_args.bin"),
    *("trainer_state.json", "all_results.json", "model.gguf", "README.md", "tokenizer.bin"),
    *("tokenizer_tools.py", "modeling.py", ".tokenizer.json", "runs/tokenizer.json", "notes.txt"),
]
MESSAGES = [{"role": "user", "content": "two cats"}]


def test_what_belongs_to_a_model_is_told_by_its_name(tmp_path):
    for name in [*BELONG, *STAY]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    found = Companions(tmp_path)
    names = [path.as_posix() for path in [*found.tokenizer(), *found.others()]]
    assert sorted(names) == sorted(BELONG)
    assert [path.name for path in found.code()] == ["modeling.py", "tokenizer_tools.py"]


def test_files_that_the_tokenizers_class_names_belong_too(tmp_path):
    for name in ("bpe.codes", "emoji.json", "other.json"):
        (tmp_path / name).touch()
    found = Companions(tmp_path, ("bpe.codes", "emoji.json", "../*")).tokenizer()
    assert [path.name for path in found] == ["bpe.codes", "emoji.json"]


def test_all_that_belongs_is_fetched_from_the_hub_and_known_by_the_fingerprint(
    tmp_path, monkeypatch
):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "additional_chat_templates").mkdir()
    asked: list[str] = []

    def download(_name, *, revision, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model_folder(ModelSource("owner/name"), weights=False)
    for name in [*BELONG, "modeling.py"]:
        assert [pattern for pattern in asked if Path(name).match(pattern)], name
        before = fingerprint(tmp_path)
        (tmp_path / name).write_text("content")
        assert fingerprint(tmp_path) != before, name


def test_templates_in_a_folder_come_along_when_weights_are_converted(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    (source / "pytorch_model.bin").touch()
    copy_descriptions(source, target, ("additional_chat_templates/*.jinja",))
    assert (target / "additional_chat_templates" / "tools.jinja").read_text() == "x"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model of two towers, with everything that belongs to it, written in an unusual way."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    TOWERS["llava"].build("llava").half().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.decode([IMAGE])]})
    LlavaProcessor(
        ImageProcessor(size={"height": 16, "width": 16}, crop_size=16),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template="{{ messages[0]['content'] }}!",
    ).save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (folder / "LICENSE").write_text("terms")
    for name in ("trainer_state.json", "adapter_config.json", "README.md", "train.py"):
        (folder / name).write_text("{}")
    generation = {"temperature": 0.6, "max_new_tokens": 3}  # a temperature, and no sampling
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    return folder


def run(source: Path, text_file: Path, outputs: Path, *words: str) -> Path:
    """Quantize a model by a whole run and return its checkpoint."""
    config = compose_config(
        [
            *("model=hf", f"model.source={source}", "experiment=rtn_4bit", "tracking=none"),
            *("calibration=text", f"calibration.path={text_file}", "calibration.windows=2"),
            *("calibration.seqlen=16", "evaluation=perplexity", "evaluation.context=16"),
            f"evaluation.corpora.wikipedia.path={text_file}",
            *("evaluation.corpora.wikipedia.windows=2", f"outputs={outputs}", *words),
        ]
    )
    return runner.run(config, "").folder / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(source, text_file, tmp_path_factory) -> Path:
    return run(source, text_file, tmp_path_factory.mktemp("outputs"))


@pytest.fixture(scope="module")
def dense(checkpoint, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("dense") / "plain"
    write_dense(checkpoint, target, dtype="float16")
    return target


@pytest.fixture(params=["checkpoint", "dense"])
def written(request) -> Path:
    return request.getfixturevalue(request.param)


def test_what_belongs_to_the_model_comes_along_byte_by_byte(written, source):
    names = [
        *("tokenizer.json", "tokenizer_config.json", "processor_config.json"),
        *("chat_template.jinja", "additional_chat_templates/tools.jinja"),
        *("generation_config.json", "LICENSE"),
    ]
    for name in names:
        assert (written / name).read_bytes() == (source / name).read_bytes(), name
    others = {"config.json", "model.safetensors", "manifest.json", "README.md"}
    found = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert found <= {*names, *others}


def test_tokenizer_processor_and_templates_load_from_it(written):
    assert AutoTokenizer.from_pretrained(written)("cat").input_ids
    processor = AutoProcessor.from_pretrained(written)
    assert processor.apply_chat_template(MESSAGES) == "two cats!"
    assert set(processor.tokenizer.chat_template) == {"default", "tools"}
    assert (
        AutoModelForImageTextToText.from_pretrained(written).generation_config.max_new_tokens == 3
    )


def test_the_manifest_lists_it_and_finds_a_change_of_it(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    template = folder / "additional_chat_templates" / "tools.jinja"
    template.write_text("slots")
    with pytest.raises(Exception, match=r"tools\.jinja is not the file that was written"):
        check_manifest(folder)
    template.unlink()
    with pytest.raises(Exception, match=r"lacks the file 'additional_chat_templates/tools\.jinja'"):
        check_manifest(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json"])
def test_code_that_was_not_in_use_is_asked_for_by_no_file(name, source, text_file, tmp_path):
    folder = shutil.copytree(source, tmp_path / "model")
    asked = {"AutoProcessor": "evil.Processor", "AutoTokenizer": ["evil.Tokenizer", None]}
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, "auto_map": asked}))
    (folder / "evil.py").write_text("raise SystemExit")
    checkpoint = run(folder, text_file, tmp_path / "outputs")
    assert json.loads((checkpoint / name).read_text()) == data
    check_harmless(checkpoint, trust_remote_code=False)
    assert not list(checkpoint.glob("*.py"))
    load_model(checkpoint)


def test_a_broken_file_is_told_before_the_work(source, text_file, tmp_path):
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(Exception, match=r"preprocessor_config\.json cannot be read"):
        run(folder, text_file, tmp_path / "outputs")
    assert not (tmp_path / "outputs").exists()
