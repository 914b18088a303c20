"""Packed checkpoints of every architecture compute what the quantized model in memory does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from led_layers import Steps, assert_follows, logits_of, recorded
from quantized_models import quantized_model
from safetensors import safe_open
from tiny_architectures import ARCHITECTURES, token_batches
from transformers import AutoModelForCausalLM, AutoTokenizer

import claq_exp
from claq_exp.checkpoint.writer import write_checkpoint
from claq_exp.export.dense import write_dense
from claq_exp.models.experts import SeparateExperts
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import OutlierOrder
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import Fixed
from claq_exp.quantize.solver import Gptq
from claq_exp.runtime.linear import quantized_linears

RECIPE = Recipe(KMeans(), OutlierOrder(2.5), Fixed(0.02), Gptq())
TOKENS = token_batches(1, seed=5)[0]


@dataclass(frozen=True)
class Written:
    """A checkpoint, the names of its packed layers, and what the model computes that it holds."""

    folder: Path
    linears: list[str]
    steps: Steps


@pytest.fixture(scope="module", params=ARCHITECTURES)
def written(request, tmp_path_factory, tiny_model) -> Written:
    architecture = ARCHITECTURES[request.param]
    place = tmp_path_factory.mktemp(request.param)
    model = architecture.build()
    batches = token_batches(2, size=4)
    result = quantized_model(model, batches, RECIPE, place / "blocks")
    folder = place / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_checkpoint(folder, model, tokenizer, result.packed, torch.float32)
    return Written(folder, architecture.linears(), recorded(model, result.packed, TOKENS))


@pytest.mark.case(50, 52)
@pytest.mark.parametrize("kernel", ["dense", "reference", "auto"])
def test_the_packages_own_loader_gives_the_same_logits(written, kernel):
    loaded = claq_exp.load(written.folder, kernel=kernel)
    assert_follows(loaded, written.steps, TOKENS)


def test_transformers_gives_the_same_logits(written):
    loaded, report = AutoModelForCausalLM.from_pretrained(
        written.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert sorted(quantized_linears(loaded)) == sorted(written.linears)
    assert_follows(loaded, written.steps, TOKENS)


def test_a_checkpoint_that_transformers_saved_again_is_the_same(written, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(written.folder, dtype=torch.float32)
    loaded.save_pretrained(tmp_path)
    files = [folder / "model.safetensors" for folder in (written.folder, tmp_path)]
    with safe_open(files[0], "pt") as first, safe_open(files[1], "pt") as second:
        assert set(first.keys()) == set(second.keys())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, TOKENS), logits_of(loaded, TOKENS))


def test_dequantized_it_is_a_plain_model_of_transformers(written, tmp_path):
    write_dense(written.folder, tmp_path / "dense", dtype="float32")
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert not [module for module in plain.modules() if isinstance(module, SeparateExperts)]
    torch.testing.assert_close(logits_of(plain, TOKENS), written.steps.logits, rtol=1e-5, atol=1e-5)
