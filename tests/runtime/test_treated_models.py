"""A packed model that is cast, copied, saved or compiled computes what it computed before."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_matrices import operand, random_weight
from quantized_checkpoints import write
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import claq_exp
from claq_exp.runtime.kernels import KERNEL
from claq_exp.runtime.linear import quantized_linears

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return write(model, tokenizer, "model.layers", tmp_path_factory.mktemp("packed") / "checkpoint")


@pytest.fixture
def model(checkpoint) -> nn.Module:
    return claq_exp.load(checkpoint, kernel="reference")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def state_again(model: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for buffer in model.state_dict().values():
        buffer.zero_()
    model.load_state_dict(state, strict=True)
    return model


def there_and_back(model: nn.Module) -> nn.Module:
    return model.to(torch.float64).to(torch.float32)


TREATMENTS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state dict": state_again,
    "cast and cast back": there_and_back,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.case(70)
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_its_logits_are_the_same(treatment, model):
    expected, found = logits(model), logits(TREATMENTS[treatment](model))
    if treatment == "compiled":  # torch 2.8 rounds it otherwise
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.case(70)
def test_cast_it_is_what_is_loaded_in_that_type_up_to_its_rounding(model, checkpoint):
    expected = claq_exp.load(checkpoint, dtype="bfloat16", kernel="reference")
    found = logits(model.to(torch.bfloat16))
    assert torch.allclose(found, logits(expected), atol=0.03)  # a cast rounds rotary angles too


@pytest.mark.case(70)
def test_half_is_refused_by_transformers_with_what_to_do(model):
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()


@pytest.mark.case(71)
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_every_output_of_its_row_and_no_other(value, kernel):
    weight = random_weight(49, 40, (2, 4), reserved=0.05)
    read = operand(weight)
    chosen = KERNEL[kernel]()
    if refusal := chosen.refusal(read):
        pytest.skip(refusal)
    inputs = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    inputs[1, 7] = value
    found = chosen.multiply(read, inputs)
    exact = inputs.double() @ weight.dequantize().double().t()
    assert torch.equal(torch.isfinite(found), torch.isfinite(exact))
    assert not torch.isfinite(found[1]).any()
    assert torch.allclose(found[[0, 2]].double(), exact[[0, 2]], atol=1e-3)


@pytest.mark.case(65)
def test_without_the_package_transformers_warns_and_nothing_of_ours_runs(checkpoint, model):
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, dtype=torch.float32)\n"
        "print(any(name.startswith('claq_exp') for name in sys.modules))\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.split() == ["False", "Linear"]
    assert "claq" in done.stderr
    assert "newly initialized" in done.stderr or "MISSING" in done.stderr
    assert quantized_linears(model)
