"""PEFT's LoRA on packed layers: adapters learn, packed weights stay as they are."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from quantized_checkpoints import write
from torch import nn
from transformers import AutoTokenizer

import claq_exp
from claq_exp.errors import ConfigError
from claq_exp.runtime.linear import QuantizedLinear, quantized_linears

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.case(120)]

TOKENS = torch.arange(1, 25).reshape(2, 12)
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    target = tmp_path_factory.mktemp("packed") / "checkpoint"
    return write(tiny_llama().float(), tokenizer, "model.layers", target)


def adapted(checkpoint: Path, kernel: str, **options: object) -> nn.Module:
    """A model with the same adapters each time, that are no zeros."""
    model = claq_exp.load(checkpoint, kernel=kernel)
    settings = {"r": 4, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_a_new_adapter_changes_nothing(checkpoint):
    model = claq_exp.load(checkpoint)
    with torch.inference_mode():
        expected = model(TOKENS).logits
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unsupported")
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=PROJECTIONS))
        assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_adapters_get_the_gradients_that_dense_weights_give(checkpoint, kernel):
    expected = gradients(adapted(checkpoint, "dense"))
    model = adapted(checkpoint, kernel)
    assert len(quantized_linears(model)) == 21
    found = gradients(model)
    assert set(found) == set(expected)
    assert all("lora" in name for name in found)
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_training_leaves_the_packed_weights_alone(checkpoint):
    model = adapted(checkpoint, "auto")
    layers = quantized_linears(model)
    before = {n: {s: t.clone() for s, t in m.stored_tensors().items()} for n, m in layers.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, stored in before.items():
        for suffix, tensor in layers[name].stored_tensors().items():
            assert torch.equal(tensor, stored[suffix]), f"{name}.{suffix}"


def test_saved_adapters_are_found_again(checkpoint, tmp_path):
    model = adapted(checkpoint, "auto")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(claq_exp.load(checkpoint), tmp_path)
    with torch.inference_mode():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_adapters_are_not_merged_into_codes(checkpoint):
    model = adapted(checkpoint, "auto")
    with pytest.raises(ConfigError, match="claq-exp export"):
        model.merge_and_unload()
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj, QuantizedLinear)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_take_the_weight_apart_are_refused(checkpoint, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.*init_lora_weights"):
        adapted(checkpoint, "auto", **options)


def test_the_gradient_of_a_packed_layer_is_that_of_its_dense_weight(checkpoint):
    layer = claq_exp.load(checkpoint).model.layers[1].mlp.up_proj
    inputs = torch.randn(3, 5, layer.in_features, requires_grad=True)
    outputs = layer(inputs)
    weights = torch.randn_like(outputs)
    (outputs * weights).sum().backward()
    expected = weights @ layer.dequantize()
    torch.testing.assert_close(inputs.grad, expected)
