"""Zeros and scales of grids that are sought, against brute force in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantize_references import Led, damped, explicit_obs, random_problem, recipe, solve

from claq_exp.errors import ConfigError
from claq_exp.payload import RealGrid, RowGrid
from claq_exp.quantize.codebook import Uniform
from claq_exp.quantize.codebook.grid_fit import best_grid, best_whole_zero, best_zero
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.solver import Gptq, Nearest

FORMS = [(zero, clip) for zero in ("whole", "real") for clip in ("minmax", "search")]
SOUGHT = FORMS[1:]


def error(values: np.ndarray, weights: np.ndarray, scale: float, zero: float, top: int) -> float:
    """The weighted squared error on a grid, every value at the nearest of all its levels."""
    levels = scale * (np.arange(top + 1) - zero)
    misses = np.abs(values[:, None] - levels[None, :]).min(axis=1)
    return float((weights * misses**2).sum())


def group(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    dice = np.random.default_rng(seed)
    values = dice.standard_normal(count) * dice.uniform(0.1, 3) + dice.normal()
    return values, dice.uniform(0.05, 2, count)


@given(st.integers(0, 10**6), st.integers(1, 24), st.sampled_from([1, 3, 7, 15]))
def test_the_best_real_zero_is_that_of_every_zero_there_is(seed, count, top):
    values, weights = group(seed, count)
    zero, found = best_zero(values, weights, top)
    assert found == pytest.approx(error(values, weights, 1.0, zero, top), rel=1e-9, abs=1e-12)
    tried = np.linspace(-values.max() - 2, top + 2 - values.min(), 3000)
    best = min(error(values, weights, 1.0, other, top) for other in tried)
    assert found <= best * (1 + 1e-12) + 1e-12


@given(st.integers(0, 10**6), st.integers(1, 24), st.sampled_from([1, 3, 7, 15]))
def test_the_best_whole_zero_is_that_of_every_code(seed, count, top):
    values, weights = group(seed, count)
    zero, found = best_whole_zero(values, weights, top)
    best = min(error(values, weights, 1.0, other, top) for other in range(top + 1))
    assert found == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert error(values, weights, 1.0, zero, top) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("top", [1, 3, 15])
def test_the_scale_is_about_as_good_as_the_best_of_all(top, real):
    ratios = []
    for seed in range(20):
        values, weights = group(seed, 32)
        start = 4 * np.abs(values).max() / top
        scale, zero = best_grid(values, weights, start, 0.0, top, real, True)
        best = np.inf
        for tried in np.linspace(0.2, 1.2, 150) * (values.max() - values.min()) / top:
            if real:
                best = min(best, best_zero(values / tried, weights, top)[1] * tried**2)
            else:
                best = min(best, best_whole_zero(values / tried, weights, top)[1] * tried**2)
        ratios.append(error(values, weights, scale, zero, top) / best)
    assert np.mean(ratios) < 1.04
    assert np.max(ratios) < 1.35


@pytest.mark.parametrize(("zero", "clip"), SOUGHT)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group_size", [0, 8])
def test_what_is_sought_is_never_worse_than_the_min_max_grid(zero, clip, bits, group_size):
    weight, hessian = random_problem(24, 40, seed=bits)
    weight[:, ::5] += 0.7
    plain, found = (
        solve(weight, hessian, recipe(codebook=rule, precision=Fixed(bits), solver=Nearest()))
        for rule in (Uniform(group_size), Uniform(group_size, zero, clip))
    )
    diagonal = hessian.diagonal()
    missed = [
        (solved.quantized.dequantize() - weight).double().square() for solved in (plain, found)
    ]
    before, after = ((each * diagonal).reshape(24, -1, group_size or 40).sum(2) for each in missed)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("block_size", [1, 128])
def test_gptq_on_real_zeros_is_optimal_brain_surgery_on_that_grid(block_size):
    weight, hessian = random_problem(rows=12, columns=13, seed=1)
    rule = Uniform(5, "real", "search")
    grid = solve(weight, hessian, recipe(codebook=rule)).quantized
    scales, zeros = grid.scales.double().numpy(), grid.zeros.double().numpy()

    def quantize(column: int, values: np.ndarray) -> np.ndarray:
        scale, zero = scales[:, column // 5], zeros[:, column // 5]
        levels = scale[:, None] * (np.arange(8)[None, :] - zero[:, None])
        cells = np.abs(values[:, None] - levels).argmin(axis=1)
        return levels[np.arange(len(levels)), cells]

    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    expected, compensated = explicit_obs(weight, damped(hessian, 0.01), order, quantize)
    chosen = recipe(codebook=Led(rule, compensated), solver=Gptq(block_size=block_size))
    found = solve(weight, hessian, chosen).quantized.dequantize()
    assert found.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_ledger_counts_zeros_of_sixteen_bits():
    weight, hessian = random_problem(10, 32, seed=2)
    real = solve(weight, hessian, recipe(codebook=Uniform(16, "real"))).quantized
    whole = solve(weight, hessian, recipe(codebook=Uniform(16))).quantized
    assert isinstance(real, RealGrid)
    assert isinstance(whole, RowGrid)
    assert real.ledger().scales == 10 * 2 * 32
    assert whole.ledger().scales == 10 * 2 * 16 + 8 * -(-10 * 2 * 3 // 8)


@pytest.mark.parametrize(("zero", "clip"), SOUGHT)
@pytest.mark.parametrize("value", [0.0, 5.0, -0.7, 60000.0])
def test_equal_weights_come_back(zero, clip, value):
    _, hessian = random_problem(9, 12, seed=3)
    rule = recipe(codebook=Uniform(4, zero, clip), precision=Fixed(2))
    found = solve(torch.full((9, 12), value), hessian, rule).quantized.dequantize()
    assert found.numpy() == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(("zero", "clip"), SOUGHT)
def test_more_bits_are_never_worse(zero, clip):
    weight, hessian = random_problem(32, 64, seed=4)
    errors = [
        solve(
            weight, hessian, recipe(codebook=Uniform(16, zero, clip), precision=Fixed(bits))
        ).output_error
        for bits in range(1, 7)
    ]
    assert all(after < before for before, after in pairwise(errors))


@pytest.mark.parametrize(("field", "value"), [("zero_point", "galaxy"), ("clip", "none")])
def test_unknown_words_are_refused_with_the_known_ones(field, value):
    with pytest.raises(ConfigError, match=rf"codebook\.{field}"):
        Uniform(**{field: value})
