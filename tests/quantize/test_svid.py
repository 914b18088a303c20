"""Signs and a magnitude of rank one, against numpy's singular value decomposition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import random_problem, recipe, solve

from claq_exp.errors import ConfigError
from claq_exp.payload import SharedCodebooks, SignScales
from claq_exp.quantize.codebook import Svid
from claq_exp.quantize.codebook.svid import magnitude
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.recipe import planned_layout
from claq_exp.quantize.solver import Gptq, Nearest

NEAREST = recipe(codebook=Svid(), precision=Fixed(1), solver=Nearest())
SHAPES = [(1, 1), (1, 7), (9, 1), (24, 40), (130, 65)]


def rank_one(weight: np.ndarray) -> np.ndarray:
    """The best approximation of |W| by one column times one row, in float64."""
    left, values, right = np.linalg.svd(np.abs(weight.astype(np.float64)))
    return values[0] * np.abs(np.outer(left[:, 0], right[0]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("draw", ["gaussian", "student", "sparse", "tiny", "large", "rank one"])
def test_the_magnitude_is_that_of_the_singular_value_decomposition(draw, shape):
    dice = np.random.default_rng(sum(shape))
    weight = {
        "gaussian": lambda: dice.normal(size=shape),
        "student": lambda: dice.standard_t(2, shape),
        "sparse": lambda: dice.normal(size=shape) * (dice.random(shape) < 0.2),
        "tiny": lambda: 1e-6 * dice.normal(size=shape),
        "large": lambda: 60000 * dice.uniform(-1, 1, shape),
        "rank one": lambda: np.outer(dice.normal(size=shape[0]), dice.normal(size=shape[1])),
    }[draw]()
    rows, columns = magnitude(torch.from_numpy(weight).float())
    assert float(rows.min()) >= 0
    assert float(columns.min()) >= 0
    found = np.outer(rows.double().numpy(), columns.double().numpy())
    expected = rank_one(weight)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_matrix_of_zeros_has_no_magnitude():
    rows, columns = magnitude(torch.zeros(3, 2))
    assert (rows.tolist(), columns.tolist()) == ([0, 0, 0], [0, 0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uncompensated_signs_are_those_of_the_weights(shape):
    weight, hessian = random_problem(*shape, seed=2)
    found = solve(weight, hessian, NEAREST).quantized
    assert isinstance(found, SignScales)
    sign = np.where(weight.numpy() >= 0, 1.0, -1.0)
    scales = np.outer(found.row_scales.double().numpy(), found.column_scales.double().numpy())
    assert np.allclose(found.dequantize().double().numpy(), sign * scales, rtol=1e-6, atol=0)
    exact = rank_one(weight.numpy())
    assert np.abs(scales - exact).max() <= 2e-3 * exact.max()  # two roundings to float16


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 30), columns=st.integers(2, 30))
def test_no_other_scales_of_rows_and_columns_have_less_squared_error(seed, rows, columns):
    dice = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=dice)
    a, b = (part.double() for part in magnitude(weight))
    sign = torch.where(weight >= 0, 1.0, -1.0).double()
    error = (weight.double() - sign * a[:, None] * b).square().sum()
    for size in (1e-3, 0.1, 1.0):
        other_a = a * (1 + size * torch.randn(rows, generator=dice))
        other_b = b * (1 + size * torch.randn(columns, generator=dice))
        other = (weight.double() - sign * other_a[:, None] * other_b).square().sum()
        assert error <= other * (1 + 1e-6)


def test_it_takes_a_bit_a_weight_and_two_vectors():
    weight, hessian = random_problem(256, 384, seed=3)
    found = solve(weight, hessian, NEAREST).quantized
    assert found.ledger().total == 256 * 384 + 16 * (256 + 384)
    assert found.layout().nominal_bits() == 1.0
    assert found.layout() == planned_layout(NEAREST, 256, 384)


def test_it_is_what_shared_codebooks_can_say_too_for_more_bits():
    found = solve(*random_problem(33, 20, seed=4), NEAREST).quantized
    columns = found.column_scales
    shared = SharedCodebooks(
        *(found.codes, found.column_bits, found.reserved),
        {1: torch.tensor([-1.0, 1.0]).half()},
        torch.stack([columns, torch.zeros_like(columns)], dim=1),
        found.row_scales,
    )
    assert torch.equal(shared.dequantize(), found.dequantize())
    assert shared.ledger().total == found.ledger().total + 16 * 20 + 16 * 2  # shifts, codebook


def test_compensation_turns_signs_so_that_outputs_err_less():
    problem = random_problem(64, 48, seed=5)
    nearest = solve(*problem, NEAREST)
    gptq = solve(*problem, recipe(codebook=Svid(), precision=Fixed(1), solver=Gptq()))
    assert torch.equal(gptq.quantized.row_scales, nearest.quantized.row_scales)
    assert not torch.equal(gptq.quantized.codes, nearest.quantized.codes)
    assert gptq.output_error < nearest.output_error


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_widths_are_refused(bits):
    with pytest.raises(ConfigError, match=r"not \d bits; use precision=fixed precision.bits=1"):
        recipe(codebook=Svid(), precision=Fixed(bits))
