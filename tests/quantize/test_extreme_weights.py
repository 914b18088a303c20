"""Weights that float16 cannot hold: refused in words, or kept; never lost, never infinite."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from quantize_references import random_problem, recipe, solve

from claq_exp.errors import NumericalError
from claq_exp.quantize.codebook import KMeans, Uniform
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.quantized import unpack_weight
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest

CODEBOOKS = [KMeans(), Uniform(), Uniform(3)]


@pytest.mark.parametrize("value", [65504.0, -65504.0, 70000.0, -70000.0, 1e6, 1e30])
@pytest.mark.parametrize("codebook", CODEBOOKS, ids=["kmeans", "uniform", "uniform_groups"])
@pytest.mark.parametrize("solver", [Gptq(), Nearest()], ids=["gptq", "nearest"])
def test_a_huge_weight_is_kept_or_refused_but_never_lost(solver, codebook, value):
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2] = value
    chosen = recipe(codebook=codebook, precision=Fixed(4), solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, where a cast overflows
        try:
            solved = solve(weight, hessian, chosen)
        except NumericalError as error:
            assert abs(value) > 65504, "float16 holds this weight"
            assert "float16" in str(error)
            return
    dense = solved.quantized.dequantize()
    assert torch.isfinite(dense).all()
    assert dense[3, 2].item() == pytest.approx(value, rel=0.01)
    assert math.isfinite(solved.output_error)
    assert math.isfinite(solved.weight_error)


@pytest.mark.parametrize("value", [70000.0, -70000.0, 1e6])
def test_what_is_stored_of_a_huge_weight_can_be_read_back(value):
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            quantized = solve(weight, hessian, recipe()).quantized
        except NumericalError:
            return
    again = unpack_weight(quantized.layout(), quantized.pack())
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("value", [70000.0, -1e6])
def test_a_reserved_weight_beyond_float16_is_refused_by_its_place(value):
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2] = value
    chosen = recipe(reservation=FixedReservation(0.05), solver=Nearest())
    with pytest.raises(NumericalError, match=r"weight\[3, 2\] .* float16"):
        solve(weight, hessian, chosen)


def test_a_reserved_weight_of_the_largest_float16_is_kept_exactly():
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2] = -65504.0
    chosen = recipe(reservation=FixedReservation(0.05), solver=Nearest())
    assert solve(weight, hessian, chosen).quantized.dequantize()[3, 2] == -65504.0


@pytest.mark.parametrize("codebook", CODEBOOKS, ids=["kmeans", "uniform", "uniform_groups"])
def test_weights_that_a_float16_model_holds_still_fit_it_after_quantizing(codebook):
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2] = 65504.0
    chosen = recipe(codebook=codebook, precision=Fixed(4), solver=Nearest())
    assert torch.isfinite(solve(weight, hessian, chosen).quantized.dequantize().half()).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_relative_error_hardly_depends_on_the_size_of_the_weights(scale):
    weight, hessian = random_problem(rows=60, columns=8, seed=1)
    plain = solve(weight, hessian, recipe())
    scaled = solve(weight * scale, hessian, recipe())
    assert scaled.weight_error == pytest.approx(plain.weight_error, rel=0.05)
    assert scaled.output_error == pytest.approx(plain.output_error, rel=0.05)
