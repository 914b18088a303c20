"""Models whose weights are pytorch_model*.bin become safetensors, once, and nothing else runs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from claq_exp.errors import SourceError
from claq_exp.models.load import load_model, load_tokenizer
from claq_exp.models.source import ModelSource, model_folder, weight_bytes
from claq_exp.sources.cache import cache_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "ffn_dim": 40, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, word_embed_proj_dim=24, vocab_size=256, max_position_embeddings=64)
    return OPTForCausalLM(config).half().eval()


def described(opt: OPTForCausalLM, tiny_model: Path, folder: Path) -> Path:
    opt.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def single(opt, tiny_model, tmp_path) -> Path:
    folder = described(opt, tiny_model, tmp_path / "opt")
    torch.save(opt.state_dict(), folder / "pytorch_model.bin")  # the head shares the embedding
    return folder


@pytest.fixture
def sharded(opt, tiny_model, tmp_path) -> Path:
    folder = described(opt, tiny_model, tmp_path / "opt-sharded")
    names = sorted(opt.state_dict())
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: opt.state_dict()[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_they_load_as_the_model_that_was_saved(form, opt, request):
    source = request.getfixturevalue(form)
    folder = model_folder(ModelSource(str(source)))
    assert folder.parent == cache_folder() / "models"
    assert folder.name.startswith(source.name)
    assert not list(folder.glob("*.bin*"))
    loaded = load_model(folder, dtype="float16", device="cpu")
    for name, tensor in opt.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert load_tokenizer(folder)("cat").input_ids == load_tokenizer(source)("cat").input_ids
    assert len(list(folder.glob("*.safetensors"))) == (2 if form == "sharded" else 1)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert plain.dtype == torch.float16
    assert plain.lm_head.weight is plain.model.decoder.embed_tokens.weight


def test_they_are_converted_once(single, monkeypatch):
    first = model_folder(ModelSource(str(single)))
    monkeypatch.setattr("claq_exp.models.source.convert_pickled", None)
    assert model_folder(ModelSource(str(single))) == first
    assert weight_bytes(first) > 0


def test_other_weights_are_converted_anew(single, opt):
    first = model_folder(ModelSource(str(single)))
    state = {name: tensor.clone() for name, tensor in opt.state_dict().items()}
    state["model.decoder.embed_positions.weight"][0, 0] += 1
    torch.save(state, single / "pytorch_model.bin")
    assert model_folder(ModelSource(str(single))) != first


def test_a_plan_converts_nothing(single):
    assert model_folder(ModelSource(str(single)), weights=False) == single
    assert not (cache_folder() / "models").exists()


def test_safetensors_are_taken_where_there_are_both(single, tiny_model):
    shutil.copy(tiny_model / "model.safetensors", single)
    assert model_folder(ModelSource(str(single))) == single


def test_weights_without_the_head_load_as_they_do_from_the_hub(single, opt):
    torch.save(opt.model.state_dict(), single / "pytorch_model.bin")  # names begin with decoder.
    loaded = load_model(model_folder(ModelSource(str(single))), dtype="float16", device="cpu")
    for name, tensor in opt.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_download_of_the_hub_is_known_by_its_blobs(single, tmp_path, monkeypatch):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, path in enumerate(sorted(single.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: [])
    monkeypatch.setattr("claq_exp.models.source.sha256_of", None)  # no reading of gigabytes
    folder = model_folder(ModelSource("owner/opt"))
    assert folder.name.startswith("opt-")
    assert not [path for path in folder.iterdir() if path.is_symlink()]
    load_model(folder, dtype="float16", device="cpu")


def test_files_of_an_old_pytorch_are_read_too(single, opt):
    path = single / "pytorch_model.bin"
    torch.save(opt.state_dict(), path, _use_new_zipfile_serialization=False)
    loaded = load_model(model_folder(ModelSource(str(single))), dtype="float16", device="cpu")
    assert torch.equal(loaded.lm_head.weight, opt.lm_head.weight)


class Bomb:
    """Runs a command where a pickle is trusted."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.case(55)
def test_code_in_a_pickle_does_not_run(single, tmp_path):
    witness = tmp_path / "ran"
    torch.save({"weight": Bomb(witness)}, single / "pytorch_model.bin")
    with pytest.raises(
        SourceError, match=r"pytorch_model\.bin cannot be read as tensors"
    ) as caught:
        model_folder(ModelSource(str(single)))
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Bomb(witness)))  # what would have happened
    assert witness.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"step": 3}, "other than tensors: 'step' is int"),
        ({"optimizer": {"lr": torch.ones(1)}}, "other than tensors: 'optimizer' is dict"),
        ([torch.ones(2)], "holds list, not tensors by name"),
        ({}, "not tensors by name"),
    ],
    ids=str,
)
def test_what_is_no_tensor_is_named(content, words, single):
    torch.save(content, single / "pytorch_model.bin")
    with pytest.raises(SourceError, match=words):
        model_folder(ModelSource(str(single)))
    assert not list((cache_folder() / "models").iterdir())


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_one_line(content, single):
    (single / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(SourceError, match=r"pytorch_model\.bin cannot be read") as caught:
        model_folder(ModelSource(str(single)))
    assert "\n" not in str(caught.value)


@pytest.mark.case(57)
def test_a_missing_shard_is_named(sharded):
    (sharded / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(SourceError, match=r"index\.json names pytorch_model-00002-of-00002\.bin"):
        model_folder(ModelSource(str(sharded)))


def test_an_index_without_files_is_named(sharded):
    (sharded / "pytorch_model.bin.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(SourceError, match=r"index\.json names no files of weights"):
        model_folder(ModelSource(str(sharded)))


@pytest.mark.case(57)
def test_a_tensor_in_two_shards_is_named(sharded):
    first, second = sorted(sharded.glob("*.bin"))
    shutil.copy(first, second)
    with pytest.raises(SourceError, match="which an earlier file holds too"):
        model_folder(ModelSource(str(sharded)))
