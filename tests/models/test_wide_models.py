"""Quantizing in float64: what is computed in it, and that batches decide on no code then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_models import opened
from tiny_architectures import ARCHITECTURES, saved, token_batches
from torch import Tensor

from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.models.blocks import capture_inputs, feed, run_block
from claq_exp.models.load import open_model
from claq_exp.models.stream import StreamedModel
from claq_exp.models.wide import wide_passes
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Alternating, Gptq, QuantEase
from claq_exp.run.quantize import quantize_model

ROPE_BASE, EPSILON = 10_000.0, 1e-6  # of a Llama config that does not say


def wide(name: str, folder: Path) -> StreamedModel:
    stored = folder / name
    if not stored.is_dir():
        saved(name, stored)
    return open_model(stored, folder, dtype="float64", device="cpu", check=False)


def turned(heads: np.ndarray) -> np.ndarray:
    """Rotary positions: [heads, seqlen, size]."""
    size = heads.shape[-1]
    angles = np.outer(np.arange(heads.shape[1]), ROPE_BASE ** -(np.arange(0, size, 2) / size))
    cosine, sine = (np.concatenate([f(angles)] * 2, axis=-1) for f in (np.cos, np.sin))
    first, second = np.split(heads, 2, axis=-1)
    return heads * cosine + np.concatenate([-second, first], axis=-1) * sine


def llama_block(weights: dict[str, np.ndarray], hidden: np.ndarray) -> np.ndarray:
    """A Llama block by hand, all in float64: [seqlen, width]."""

    def normed(values: np.ndarray, name: str) -> np.ndarray:
        mean = (values**2).mean(axis=-1, keepdims=True)
        return values / np.sqrt(mean + EPSILON) * weights[f"{name}_layernorm.weight"]

    def heads(values: np.ndarray, name: str) -> np.ndarray:
        made = values @ weights[f"self_attn.{name}_proj.weight"].T
        return made.reshape(len(values), -1, 6).transpose(1, 0, 2)

    entering = normed(hidden, "input")
    query, key, value = (heads(entering, name) for name in "qkv")
    query, key = turned(query), turned(key)
    key, value = (np.repeat(part, 2, axis=0) for part in (key, value))
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(6)
    scores[:, *np.triu_indices(len(hidden), 1)] = -np.inf
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = (shares @ value).transpose(1, 0, 2).reshape(len(hidden), -1)
    hidden = hidden + mixed @ weights["self_attn.o_proj.weight"].T
    entering = normed(hidden, "post_attention")
    gate = entering @ weights["mlp.gate_proj.weight"].T
    up = entering @ weights["mlp.up_proj.weight"].T
    return hidden + (gate / (1 + np.exp(-gate)) * up) @ weights["mlp.down_proj.weight"].T


def test_a_block_in_float64_computes_nothing_in_float32(tmp_path):
    model = wide("llama", tmp_path)
    inputs = capture_inputs(model, token_batches())[0]
    with torch.no_grad(), model.block(0) as block:
        found = run_block(block, inputs, 0)
        weights = {name: value.double().numpy() for name, value in block.state_dict().items()}
    assert found.dtype == torch.float64
    for window, entering in zip(found, inputs.hidden[0], strict=True):
        expected = llama_block(weights, entering.numpy())
        assert np.abs(window.numpy() - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_models_of_all_kinds_run_in_float64(name, tmp_path):
    model = wide(name, tmp_path)
    plain = open_model(tmp_path / name, tmp_path, dtype="float32", device="cpu", check=False)
    outputs = []
    for opened_model in (model, plain):
        inputs = capture_inputs(opened_model, token_batches())[0]
        with torch.no_grad(), opened_model.block(0) as block:
            outputs.append(run_block(block, inputs, 0))
    assert [output.dtype for output in outputs] == [torch.float64, torch.float32]
    assert torch.allclose(outputs[0].float(), outputs[1], rtol=1e-4, atol=1e-4)


def test_what_is_asked_in_float32_is_float64_only_for_a_model_in_float64():
    numbers = torch.ones(2, dtype=torch.float64)
    for dtype, expected in ((torch.float64,) * 2, (torch.float32,) * 2, (None, torch.float32)):
        with wide_passes(dtype):
            asked = (
                numbers.float(),
                numbers.to(torch.float32),
                numbers.to(dtype=torch.float32),
                torch.softmax(numbers, dim=0, dtype=torch.float32),
                torch.arange(2, dtype=torch.float32),
            )
        assert {tensor.dtype for tensor in asked} == {expected}
        assert numbers.float().dtype == torch.float32


def test_the_moments_of_a_model_in_float64_say_so(tmp_path):
    model = wide("llama", tmp_path)
    inputs = capture_inputs(model, token_batches())[0]
    found = MomentsAccumulator(24)
    with torch.no_grad(), model.block(0) as block:
        query = block.get_submodule("self_attn.q_proj")
        feed(block, inputs, 0, {query: lambda entering: found.add(entering, where="here")})
    assert found.moments().wide


@pytest.mark.parametrize(
    "solver", [Gptq(block_size=8), Gptq(asymmetric=0.5), QuantEase(), Alternating()]
)
def test_codes_of_a_model_in_float64_do_not_depend_on_batches(solver, tmp_path):
    tokens = torch.cat(token_batches(batches=3, size=4))
    recipe = Recipe(KMeans(), Fixed(2), NoReservation(), solver)
    runs: list[dict[str, Tensor]] = []
    for size in (1, 5, 12):
        store = opened(tmp_path / f"store{size}")
        quantize_model(wide("llama", tmp_path), list(tokens.split(size)), recipe, store)
        packed = store.packed()
        runs.append({f"{n}.{s}": t for n, w in packed.items() for s, t in w.tensors.items()})
    for run in runs[1:]:
        assert runs[0].keys() == run.keys()
        assert all(torch.equal(tensor, run[name]) for name, tensor in runs[0].items())
