"""Weights that float16 cannot hold: refused in words, or kept; never lost, never infinite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from quantize_references import random_problem, recipe, solve

from claq_exp.errors import NumericalError
from claq_exp.payload import SharedCodebooks, unpack_weight
from claq_exp.payload.columns import Reserved
from claq_exp.quantize.codebook import CODEBOOK, KMeans, Uniform
from claq_exp.quantize.codebook.block_formats import BlockCodebook
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest

CODEBOOKS = [KMeans(), Uniform(), Uniform(3)]


every_codebook = pytest.mark.parametrize(
    "codebook", CODEBOOKS, ids=["kmeans", "uniform", "uniform_groups"]
)
every_solver = pytest.mark.parametrize("solver", [Gptq(), Nearest()], ids=["gptq", "nearest"])


@pytest.mark.parametrize("value", [65505.0, -70000.0, 1e6, 1e30])
@every_codebook
@every_solver
def test_a_weight_beyond_float16_is_refused_by_its_place(solver, codebook, value):
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2] = value
    chosen = recipe(codebook=codebook, precision=Fixed(4), solver=solver)
    with pytest.raises(NumericalError, match=r"weight\[3, 2\].*float16"):
        solve(weight, hessian, chosen)


@pytest.mark.parametrize("value", [65504.0, -65504.0])
@every_codebook
@every_solver
def test_the_largest_weight_of_float16_is_kept_and_can_be_read_back(solver, codebook, value):
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2] = value
    solved = solve(weight, hessian, recipe(codebook=codebook, precision=Fixed(4), solver=solver))
    dense = solved.quantized.dequantize()
    assert dense[3, 2].item() == pytest.approx(value, rel=0.01)
    assert math.isfinite(solved.output_error)
    assert math.isfinite(solved.weight_error)
    again = unpack_weight(solved.quantized.layout(), solved.quantized.pack())
    assert torch.equal(again.dequantize(), dense)


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


@every_codebook
def test_weights_that_a_float16_model_holds_still_fit_it_after_quantizing(codebook):
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2] = 65504.0
    chosen = recipe(codebook=codebook, precision=Fixed(4), solver=Nearest())
    assert torch.isfinite(solve(weight, hessian, chosen).quantized.dequantize().half()).all()


def test_weights_beyond_float16_by_their_level_are_cut_and_counted():
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    plain = solve(weight, hessian, recipe(solver=Nearest()))
    assert plain.clamped == 0
    books = {1: torch.tensor([-2.0, 2.0], dtype=torch.float16)}
    scales = torch.tensor([[1.0, 0.0], [40000.0, 0.0]], dtype=torch.float16)
    codes = torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.uint8)
    kept = Reserved(
        torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([5.0], dtype=torch.float16)
    )
    widths = torch.ones(2, dtype=torch.uint8)
    matrix = SharedCodebooks(codes, widths, kept, books, scales)
    assert matrix.dequantize().tolist() == [[-2.0, -65504.0], [-2.0, 65504.0], [2.0, 5.0]]
    assert matrix.clamped() == 2  # a reserved entry has no level


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_step_beyond_float16_is_refused():
    weight, hessian = random_problem(rows=20, columns=6, seed=0)
    weight[3, 2], weight[3, 4] = 65504.0, -65504.0  # one bit: a step of 131008
    chosen = recipe(codebook=Uniform(), precision=Fixed(1), solver=Nearest())
    with pytest.raises(NumericalError, match="float16"):
        solve(weight, hessian, chosen)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_level_that_compensation_pushes_beyond_float16_is_refused():
    weight = torch.full((20, 2), 65504.0)
    weight[:, 0] = torch.linspace(-60000, 60000, 20)
    hessian = torch.tensor([[2.0, 1.9], [1.9, 1.9]], dtype=torch.float64)
    with pytest.raises(NumericalError, match="float16"):
        solve(weight, hessian, recipe(precision=Fixed(1)))


OVERFLOWING = [CODEBOOK[name]() for name in CODEBOOK if name != "uniform"]
OVERFLOWING += [KMeans(shared=True), KMeans(shared=True, row_scales=True)]


@pytest.mark.parametrize("codebook", OVERFLOWING, ids=str)
def test_what_follows_a_level_beyond_float16_is_refused_or_finite(codebook):
    weight = torch.full((20, 4), 65504.0)
    weight[:, 0] = torch.linspace(-60000, 60000, 20)
    weight[:, 2:] = random_problem(rows=20, columns=2, seed=0)[0]
    hessian = torch.full((4, 4), 0.5, dtype=torch.float64)
    hessian[:2, :2] = 1.9
    hessian[torch.arange(4), torch.arange(4)] = torch.tensor([2.0, 1.9, 1.0, 1.0]).double()
    width = 4 if isinstance(codebook, BlockCodebook) else 1
    try:
        solved = solve(weight, hessian, recipe(codebook=codebook, precision=Fixed(width)))
    except NumericalError as error:
        assert "float16" in str(error)
    else:
        assert torch.isfinite(solved.quantized.dequantize()).all()
        difference = weight.double() - solved.quantized.dequantize().double()
        whole = torch.trace(weight.double() @ hessian @ weight.double().t())
        wrong = torch.trace(difference @ hessian @ difference.t()) / whole
        assert solved.output_error == pytest.approx(wrong.item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_relative_error_hardly_depends_on_the_size_of_the_weights(scale):
    weight, hessian = random_problem(rows=60, columns=8, seed=1)
    chosen = recipe(solver=Nearest())  # no column follows from another one's rounding
    plain, scaled = (solve(weight * factor, hessian, chosen) for factor in (1.0, scale))
    assert scaled.weight_error == pytest.approx(plain.weight_error, rel=0.05)
    assert scaled.output_error == pytest.approx(plain.output_error, rel=0.05)


@pytest.mark.parametrize("scale", [2.0**-2, 2.0**10])
def test_a_power_of_two_changes_no_code(scale):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(64, 512, (60, 8), generator=generator) / 128  # no level is subnormal
    _, hessian = random_problem(rows=60, columns=8, seed=1)
    plain, scaled = (solve(weight * factor, hessian, recipe()) for factor in (1.0, scale))
    assert torch.equal(scaled.quantized.codes, plain.quantized.codes)
    assert scaled.weight_error == pytest.approx(plain.weight_error, rel=1e-6)
    assert scaled.output_error == pytest.approx(plain.output_error, rel=1e-6)


@pytest.mark.parametrize("damage", ["books", "column_scales", "row_scales"])
def test_levels_beyond_float16_are_told(damage):
    codebook = KMeans(shared=True, row_scales=True)
    chosen = recipe(codebook=codebook, precision=Fixed(2))
    levels = solve(*random_problem(rows=20, columns=6, seed=0), chosen).quantized
    assert levels.finite()
    if damage == "books":
        broken = replace(levels, books={**levels.books, 2: levels.books[2] / 0})
    else:
        broken = replace(levels, **{damage: getattr(levels, damage) * torch.inf})
    assert not broken.finite()
