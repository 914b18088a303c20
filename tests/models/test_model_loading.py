"""Models and tokenizers from a folder, and the words when the folder is not what it should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    EncodecConfig,
    LlamaConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    T5Config,
)

from claq_exp.errors import ClaqError, ConfigError, SourceError
from claq_exp.models.load import (
    forward_dtype,
    load_config,
    load_model,
    load_tokenizer,
    look_at,
    stored_dtype,
    tokenize,
)
from claq_exp.models.skeleton import skeleton


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.mark.case(54)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_loads_in_the_wanted_dtype_ready_to_evaluate(tiny_model, dtype):
    model = load_model(tiny_model, dtype=dtype, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    stored = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.model.embed_tokens.weight, stored.to(getattr(torch, dtype)))


def test_a_missing_tensor_is_refused_by_name(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks 1 tensor of.*layers\.1\.mlp\.up_proj"):
        load_model(folder, dtype="float32", device="cpu")


def test_weights_of_another_shape_are_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"shape.*model\.norm\.weight"):
        load_model(folder, dtype="float32", device="cpu")


@pytest.mark.case(54)
def test_a_model_that_is_already_quantized_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="already quantized"):
        load_model(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("read", [load_config, load_tokenizer])
def test_a_folder_that_is_no_model_is_refused_by_its_path(read, tmp_path):
    with pytest.raises(SourceError, match=str(tmp_path)):
        read(tmp_path)


@pytest.mark.case(53)
def test_an_unknown_architecture_is_refused_by_its_path(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "galaxy"}))
    with pytest.raises(SourceError, match=str(folder)):
        load_config(folder)


@pytest.mark.case(56)
def test_code_of_a_model_does_not_run_unasked(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "galaxy", "auto_map": {"AutoConfig": "galaxy.GalaxyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "galaxy.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code"):
        load_config(folder)


def test_a_text_becomes_the_ids_of_its_tokenizer(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenize(tokenizer, "the cat")
    assert ids.dtype == torch.int64
    assert ids.shape == (7,)
    assert tokenizer.decode(ids) == "the cat"


def test_a_text_longer_than_the_model_is_not_cut(tiny_model):
    assert len(tokenize(load_tokenizer(tiny_model), "x" * 5000)) == 5000


def test_the_stored_dtype_is_the_configs_or_float16(tiny_model):
    assert stored_dtype(load_config(tiny_model)) == torch.float16
    assert stored_dtype(LlamaConfig(dtype=torch.bfloat16)) == torch.bfloat16
    assert stored_dtype(LlamaConfig()) == torch.float16


def test_an_encoder_is_refused(tmp_path):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    config = BertConfig(**sizes, num_hidden_layers=2, vocab_size=64, initializer_range=0.3)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"\(bert\) is no causal language model.*decoder"):
        load_model(tmp_path, dtype="float32", device="cpu")


@pytest.mark.case(53)
def test_a_config_that_names_two_text_models_is_refused(tmp_path):
    parts = {
        "text_encoder": T5Config().to_dict(),
        "audio_encoder": EncodecConfig().to_dict(),
        "decoder": MusicgenDecoderConfig().to_dict(),
    }
    MusicgenConfig(**parts).save_pretrained(tmp_path)
    with pytest.raises(ClaqError, match="its config names no text model: Multiple") as caught:
        look_at(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_another_kind_is_refused_before_its_weights_are_there():
    with pytest.raises(ConfigError, match=r"t5\) is no causal language model"):
        skeleton(T5Config())


@pytest.mark.parametrize(
    ("wanted", "stored", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", "float32"),
        ("auto", torch.bfloat16, "cuda", "bfloat16"),
        ("auto", torch.float16, "cuda:1", "float16"),
        ("auto", torch.float32, "cuda", "float32"),
        ("auto", torch.float64, "cuda", "float32"),
        ("auto", None, "cuda", "float32"),
        ("bfloat16", torch.float16, "cpu", "bfloat16"),
        ("float32", torch.float16, "cuda", "float32"),
    ],
)
def test_the_dtype_of_forward_passes_is_the_wanted_one_or_fits_the_device(
    wanted, stored, device, expected
):
    assert forward_dtype(wanted, LlamaConfig(dtype=stored), device) == expected
