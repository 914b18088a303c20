"""transformers loads, runs and saves packed checkpoints once claq_exp was imported."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from led_layers import assert_follows, recorded
from packed_matrices import random_weight
from quantized_checkpoints import write
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import claq_exp
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.runtime.huggingface import pack_linears
from claq_exp.runtime.linear import QuantizedLinear, quantized_linears
from claq_exp.system.hooks import on_import

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    target = tmp_path_factory.mktemp("packed") / "checkpoint"
    return write(model, tokenizer, "model.layers", target)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS.to(model.device)).logits


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_it_computes_what_the_dense_model_computes(checkpoint, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    dense = claq_exp.load(checkpoint, dtype=dtype, kernel="dense")
    reference = claq_exp.load(checkpoint, dtype=dtype, kernel="reference")
    assert len(quantized_linears(loaded)) == 21
    steps = recorded(dense, quantized_linears(loaded), TOKENS)
    for packed in (loaded, reference):
        assert_follows(packed, steps, TOKENS)


@pytest.mark.case(69)
def test_a_bfloat16_model_keeps_float16_codebooks(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    layer = loaded.model.layers[0].mlp.up_proj
    assert isinstance(layer, QuantizedLinear)
    stored = {name: tensor.dtype for name, tensor in layer.stored_tensors().items()}
    assert set(stored.values()) == {torch.uint8, torch.float16}
    assert loaded.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.case(51)
def test_tied_embeddings_stay_tied(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_device_map_and_generation(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint, device_map="auto", dtype=torch.float32
    )
    dense = claq_exp.load(checkpoint, kernel="dense")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": TOKENS[:1], "attention_mask": torch.ones_like(TOKENS[:1])}
    moved = {name: tensor.to(loaded.device) for name, tensor in prompt.items()}
    found = loaded.generate(**moved, **options).cpu()
    assert torch.equal(found[:, : TOKENS.shape[1]], TOKENS[:1])
    assert found.shape[1] == TOKENS.shape[1] + 6
    with torch.inference_mode():
        scores = dense(found).logits[:, TOKENS.shape[1] - 1 : -1]
    chosen = scores.gather(2, found[:, TOKENS.shape[1] :, None])[..., 0]
    # none was chosen that the dense model finds worse than its own choice: ties may go either way
    assert (chosen >= scores.amax(dim=2) - 1e-4 * scores.std()).all()


@pytest.mark.case(69)
def test_saving_again_gives_the_same_bytes(checkpoint, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    loaded.save_pretrained(tmp_path / "again")
    again = tmp_path / "again"
    assert filecmp.cmp(checkpoint / "model.safetensors", again / "model.safetensors", shallow=False)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, again)]
    assert configs[0] == configs[1]
    with pytest.raises(CheckpointError, match=r"no manifest\.json .*load it with from_pretrained"):
        claq_exp.load(again)
    third = AutoModelForCausalLM.from_pretrained(again, dtype="auto")
    assert torch.equal(logits(third), logits(loaded))


def test_lm_eval_loads_it_by_its_folder(checkpoint):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=1, dtype="float32")
    assert isinstance(model.model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert torch.allclose(
        model.model(TOKENS).logits, logits(claq_exp.load(checkpoint)), atol=1e-5, rtol=1e-4
    )


def test_no_gradients_are_asked_for(checkpoint):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not any(p.requires_grad for p in loaded.model.layers[0].mlp.up_proj.parameters())


@pytest.mark.parametrize(
    "first", ["claq_exp", "transformers.quantizers.auto", "claq_exp.run.runner"]
)
def test_the_order_of_imports_does_not_matter(checkpoint, first):
    program = (
        f"import {first}\nimport claq_exp\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "QuantizedLinear"


def test_importing_the_package_imports_neither_torch_nor_transformers():
    program = (
        "import sys, claq_exp; print(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_the_hook_acts_at_once_on_what_is_imported_and_once_on_what_is_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "awaited_module.py").write_text("VALUE = 3\n")
    seen: list[str] = []
    on_import("awaited_module", lambda: seen.append("later"))
    assert not seen
    import awaited_module

    assert (awaited_module.VALUE, seen) == (3, ["later"])
    on_import("awaited_module", lambda: seen.append("at once"))
    assert seen == ["later", "at once"]


@pytest.mark.case(50)
def test_gpt2_and_its_conv1d_layers(tmp_path, tiny_model):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=256, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    folder = write(model, tokenizer, "transformer.h", tmp_path / "checkpoint")
    packed = claq_exp.load(folder, kernel="reference")
    assert torch.allclose(logits(packed), logits(claq_exp.load(folder, kernel="dense")), atol=1e-5)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(again), logits(packed), atol=1e-4)


def test_layers_that_do_not_fit_the_model_are_refused():
    layouts = {"model.layers.0.mlp.up_proj": None}
    with pytest.raises(CheckpointError, match=r"no linear layer 'model\.layers\.9"):
        pack_linears(tiny_llama(), {"model.layers.9.mlp.up_proj": layouts})
    wrong = random_weight(8, 8).layout()
    with pytest.raises(CheckpointError, match="is 8 x 8, the model's layer 72 x 48"):
        pack_linears(tiny_llama(), {"model.layers.0.mlp.up_proj": wrong})


def test_kernels_are_chosen_by_name(checkpoint):
    with pytest.raises(ConfigError, match=r"kernel 'fast' is not known.*auto, cpu, dense"):
        claq_exp.load(checkpoint, kernel="fast")
    loaded = claq_exp.load(checkpoint, kernel="reference")
    assert {layer.kernel for layer in quantized_linears(loaded).values()} == {"reference"}
