"""Work on a symmetric matrix by bands against the same on the whole matrix."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claq_exp.quantize.symmetric import BAND, energy, is_finite, mirror_, permute_

SIZES = [1, 2, BAND - 1, BAND, BAND + 1, 2 * BAND + 7]


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return half @ half.t()


@pytest.mark.parametrize("size", SIZES)
def test_mirroring_restores_what_is_below_the_diagonal(size):
    matrix = symmetric(size)
    spoiled = matrix.triu() + torch.full_like(matrix, 7.0).tril(-1)
    mirror_(spoiled)
    assert torch.equal(spoiled, matrix.triu() + matrix.triu(1).t())


@pytest.mark.case(34)
@pytest.mark.parametrize("size", SIZES)
def test_a_permutation_in_place_is_that_of_rows_and_columns(size):
    matrix = symmetric(size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    permuted = matrix.clone()
    permute_(permuted, order)
    assert torch.equal(permuted, matrix[order][:, order])
    permute_(permuted, torch.argsort(order))
    assert torch.equal(permuted, matrix)


@settings(max_examples=60)
@given(rows=st.integers(1, 9), columns=st.integers(1, 2 * BAND + 3), seed=st.integers(0, 99))
def test_the_energy_is_the_trace_in_float64(rows, columns, seed):
    hessian = symmetric(columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    before = hessian.clone()
    exact = torch.trace(weight.double() @ hessian @ weight.double().t()).item()
    assert energy(weight, hessian) == pytest.approx(exact, rel=1e-4)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (BAND, 3), (2 * BAND, 2 * BAND)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_entry_that_is_no_number_is_seen(bad, place, dtype):
    matrix = torch.full((2 * BAND + 1, 2 * BAND + 1), 1e38, dtype=dtype)
    assert is_finite(matrix)
    matrix[place] = bad
    assert not is_finite(matrix)
    matrix[0, 1] = -bad
    assert not is_finite(matrix)
