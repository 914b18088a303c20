"""Which files of a folder are the weights: those that transformers loads, for all who ask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from claq_exp.errors import ConfigError, SourceError
from claq_exp.models.load import load_model
from claq_exp.models.source import ModelSource, fingerprint, model_folder, weight_bytes
from claq_exp.sources.weight_files import weight_files

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model(tiny_model, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def store(tensors: dict, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def shards(folder: Path, tensors: dict, form: str, index: str) -> None:
    """Store tensors in two files with an index."""
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        name = form.format(number)
        store({key: tensors[key] for key in part}, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def stored_in_every_form(folder: Path) -> None:
    """Leave the model in all forms, each marked by the first number of its embedding."""
    tensors = load_file(folder / "model.safetensors")
    forms = [
        lambda: store(tensors, folder / "model.safetensors"),
        lambda: shards(folder, tensors, "part-{}.safetensors", "model.safetensors.index.json"),
        lambda: store(tensors, folder / "pytorch_model.bin"),
        lambda: shards(folder, tensors, "part-{}.bin", "pytorch_model.bin.index.json"),
    ]
    for mark, write in enumerate(forms, start=1):
        tensors[EMBEDDING][0, 0] = mark
        write()


@pytest.mark.case(113)
def test_of_several_forms_the_one_that_transformers_loads_is_taken(model):
    from transformers import AutoModelForCausalLM

    stored_in_every_form(model)
    ways = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    for mark, file in enumerate([*ways, "pytorch_model.bin.index.json"], start=1):
        theirs = AutoModelForCausalLM.from_pretrained(model).get_parameter(EMBEDDING)
        folder = model_folder(ModelSource(str(model)))
        ours = load_model(folder, dtype="float32", device="cpu").get_parameter(EMBEDDING)
        assert (theirs[0, 0].item(), ours[0, 0].item()) == (mark, mark)
        if file != "pytorch_model.bin.index.json":
            (model / file).unlink()


BESIDE = [
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "model.gguf",
    "original/consolidated.00.pth",
]


@pytest.mark.case(113)
@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_the_weights_changes_nothing(name, model):
    before = fingerprint(model), weight_bytes(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"nothing that can be read")
    assert model_folder(ModelSource(str(model))) == model
    assert (fingerprint(model), weight_bytes(model)) == before
    load_model(model, dtype="float32", device="cpu")


@pytest.mark.case(113)
def test_pickled_weights_beside_an_adapter_are_the_weights(model):
    """An adapter in safetensors once made them out of reach."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    store(tensors, model / "pytorch_model.bin")
    store({"a": torch.zeros(2)}, model / "adapter_model.safetensors")
    loaded = load_model(model_folder(ModelSource(str(model))), dtype="float16", device="cpu")
    assert torch.equal(loaded.get_parameter(EMBEDDING), tensors[EMBEDDING])


@pytest.mark.case(113)
def test_shards_in_a_folder_and_tensors_that_the_index_forgets_are_read(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = "model.safetensors.index.json"
    shards(model, tensors, "parts/{}.safetensors", index)
    written = json.loads((model / index).read_text())
    del written["weight_map"][EMBEDDING]
    (model / index).write_text(json.dumps(written))
    loaded = load_model(model_folder(ModelSource(str(model))), dtype="float16", device="cpu")
    assert torch.equal(loaded.get_parameter(EMBEDDING), tensors[EMBEDDING])
    assert weight_bytes(model) == sum(path.stat().st_size for path in model.glob("parts/*"))


@pytest.mark.case(113)
def test_the_file_that_the_config_names_comes_first(model):
    store(load_file(model / "model.safetensors"), model / "mine.safetensors")
    config = json.loads((model / "config.json").read_text())
    path = model / "config.json"
    path.write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
    assert weight_files(model).files == (model / "mine.safetensors",)
    path.write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(SourceError, match=r"transformers_weights is 'other\.safetensors'"):
        weight_files(model)


@pytest.mark.case(114)
@pytest.mark.parametrize("weights", [True, False], ids=["run", "plan"])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("adapter_model.safetensors", "merge the adapter into its base model"),
        ("adapter_model.bin", "merge the adapter into its base model"),
        ("consolidated.safetensors", "the form of transformers"),
        ("original/consolidated.00.pth", "the form of transformers"),
        ("model.fp16.safetensors", "the name without the variant"),
        ("model.safetensors.index.fp16.json", "the name without the variant"),
        ("model-00001-of-00002.safetensors", "the index of these shards"),
        ("pytorch_model-00001-of-00002.bin", "the index of these shards"),
        ("tiny.Q4_0.gguf", "as model.source"),
        ("tf_model.h5", "save_pretrained"),
        ("weights.safetensors", "name it model.safetensors"),
    ],
)
def test_weights_that_are_none_of_a_model_are_listed_with_a_way_out(name, advice, weights, model):
    (model / name).parent.mkdir(exist_ok=True)
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(ConfigError) as caught:
        model_folder(ModelSource(str(model)), weights=weights)
    assert f"found {name}; " in str(caught.value)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.case(114)
def test_a_folder_with_an_adapter_alone_is_told_apart_from_a_wrong_one(model):
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json$"):
        model_folder(ModelSource(str(model)))
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"no config\.json, but an adapter; merge"):
        model_folder(ModelSource(str(model)))


@pytest.mark.case(57)
@pytest.mark.parametrize("weights", [True, False], ids=["run", "plan"])
def test_a_shard_outside_of_the_folder_or_missing_and_a_dead_link_are_refused(weights, model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    shards(model, tensors, "part-{}.safetensors", index.name)
    (model / "part-2.safetensors").unlink()
    with pytest.raises(SourceError, match=r"index\.json names part-2\.safetensors, which is not"):
        model_folder(ModelSource(str(model)), weights=weights)
    index.write_text(json.dumps({"weight_map": {"a": "../part-1.safetensors"}}))
    with pytest.raises(SourceError, match=r"'\.\./part-1\.safetensors', which is no file of its"):
        model_folder(ModelSource(str(model)), weights=weights)
    (model / "model.safetensors").symlink_to(model / "blobs" / "gone")
    with pytest.raises(SourceError, match=r"model\.safetensors leads nowhere"):
        model_folder(ModelSource(str(model)), weights=weights)
