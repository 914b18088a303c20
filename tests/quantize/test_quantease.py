"""Coordinate descent against a full search in float64, and what no sweep may do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import random_problem, recipe
from test_asymmetric_gptq import Layer, layer
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.payload import unpack_weight
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.codebook import CODEBOOK, KMeans, Uniform
from claq_exp.quantize.moments import CROSS, Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, decide, quantize_weight
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest, QuantEase
from claq_exp.quantize.solver.base import Solved

BITS = {"mxfp4": 4, "nvfp4": 4, "svid": 1}


def solved(weight: Tensor, hessian: Tensor, chosen: Recipe, rows: Tensor | None = None) -> Solved:
    """Quantize a matrix; rows: what each of them weighs."""
    problem = LinearProblem(weight, hessian)
    prepared = chosen.solver.prepare(Moments(hessian))
    plan = replace(decide(problem, prepared, chosen, None), row_weights=rows)
    return chosen.solver.solve(problem, prepared, plan)


def damped_loss(
    weight: Tensor, hessian: Tensor, found: Solved, damping: float, rows: Tensor | None = None
) -> float:
    """Return tr(G D (H + damping * mean diagonal) D^T) in float64, dead columns left out."""
    missed = found.quantized.dequantize().double() - weight.double()
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    full = hessian + damping * diagonal[alive].mean() * torch.eye(len(hessian)).double()
    weights = torch.ones(len(weight)) if rows is None else rows
    missed = weights.double().sqrt()[:, None] * missed
    missed[:, ~alive] = 0
    return ((missed @ full) * missed).sum().item()


def searched(
    weight: np.ndarray,
    hessian: np.ndarray,
    start: np.ndarray,
    grids: np.ndarray,
    order: list[int],
    by_column: bool = False,
) -> tuple[np.ndarray, float]:
    """Sweep once in float64: try every level of every entry, summing the loss in full.

    grids: [out, levels]; [in, levels] by column.
    Returns the matrix, and by how much the second-best level lost at least.
    """
    found, margin = start.copy(), np.inf
    for column, row in itertools.product(order, range(len(weight))):
        missed = found[row] - weight[row]
        losses = []
        grid = grids[column if by_column else row]
        for level in grid:
            missed[column] = level - weight[row, column]
            losses.append(missed @ hessian @ missed)
        first, second = np.sort(losses)[:2]
        margin = min(margin, (second - first) / first)
        found[row, column] = grid[int(np.argmin(losses))]
    return found, margin


@pytest.mark.parametrize("start", [Gptq(), Nearest()], ids=["gptq", "nearest"])
@pytest.mark.parametrize("block_size", [1, 3, 128])
def test_each_column_takes_the_levels_that_a_full_search_takes(start, block_size):
    weight, hessian = random_problem(rows=5, columns=7, seed=3)
    grid = {"codebook": Uniform(), "precision": Fixed(2)}
    first = solved(weight, hessian, recipe(**grid, solver=start)).quantized
    scales, zeros = first.scales[:, :1].double(), first.zeros[:, :1].double()
    grids = (scales * (torch.arange(4) - zeros)).numpy()
    exact = hessian.numpy() + 0.01 * hessian.diagonal().mean().item() * np.eye(7)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable").tolist()
    expected = first.dequantize().double().numpy()
    name = "nearest" if isinstance(start, Nearest) else "gptq"
    for sweeps in (1, 2, 3):
        expected, margin = searched(weight.double().numpy(), exact, expected, grids, order)
        assert margin > 1e-3  # no rounding decides
        solver = QuantEase(start=name, sweeps=sweeps, block_size=block_size)
        found = solved(weight, hessian, recipe(**grid, solver=solver))
        assert np.array_equal(found.quantized.dequantize().double().numpy(), expected)


@pytest.mark.parametrize("name", CODEBOOK)
def test_no_sweep_raises_the_loss_and_the_start_is_never_better(name):
    codebook = CODEBOOK[name]()
    weight, hessian = random_problem(rows=30, columns=20, seed=4)
    hessian[2] = 0
    hessian[:, 2] = 0
    changes = {"reservation": FixedReservation(0.1)} if codebook.reserves else {}
    chosen = recipe(codebook=codebook, precision=Fixed(BITS.get(name, 2)), **changes)
    losses = [damped_loss(weight, hessian, solved(weight, hessian, chosen), 0.01)]
    for sweeps in (1, 2, 5):
        found = solved(weight, hessian, replace(chosen, solver=QuantEase(sweeps=sweeps)))
        losses.append(damped_loss(weight, hessian, found, 0.01))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.99 * losses[0]
    packed, dense = found.quantized.pack(), found.quantized.dequantize()
    assert torch.equal(unpack_weight(found.quantized.layout(), packed).dequantize(), dense)
    assert found.dead_columns == 1


@pytest.mark.parametrize("start", ["gptq", "nearest"])
@pytest.mark.parametrize("block_size", [1, 3, 128])
def test_without_refit_codes_move_among_the_levels_of_the_start(start, block_size):
    """The search tries every level of an entry's column; nothing else is free."""
    weight, hessian = random_problem(rows=16, columns=10, seed=29)
    loop = Nearest() if start == "nearest" else Gptq()
    first = solved(weight, hessian, recipe(precision=Fixed(2), solver=loop)).quantized
    exact = hessian.numpy() + 0.01 * hessian.diagonal().mean().item() * np.eye(10)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable").tolist()
    expected = first.dequantize().double().numpy()
    levels = first.values.double().numpy()
    moved = 0
    for sweeps in (1, 2, 3):
        before = expected
        expected, margin = searched(weight.double().numpy(), exact, before, levels, order, True)
        assert margin > 1e-4  # no rounding decides
        moved += (before != expected).sum()
        solver = QuantEase(start=start, sweeps=sweeps, block_size=block_size, refit=False)
        found = solved(weight, hessian, recipe(precision=Fixed(2), solver=solver)).quantized
        assert torch.equal(found.values, first.values)
        assert np.array_equal(found.dequantize().double().numpy(), expected)
    assert moved


@pytest.mark.parametrize("name", CODEBOOK)
def test_without_refit_levels_stay_and_the_loss_falls_all_the_same(name):
    codebook = CODEBOOK[name]()
    weight, hessian = random_problem(rows=30, columns=20, seed=4)
    changes = {"reservation": FixedReservation(0.1)} if codebook.reserves else {}
    chosen = recipe(codebook=codebook, precision=Fixed(BITS.get(name, 2)), **changes)
    first = solved(weight, hessian, chosen)
    losses = [damped_loss(weight, hessian, first, 0.01)]
    for sweeps in (1, 2, 5):
        solver = QuantEase(sweeps=sweeps, refit=False)
        found = solved(weight, hessian, replace(chosen, solver=solver))
        losses.append(damped_loss(weight, hessian, found, 0.01))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.999 * losses[0]
    values = found.quantized.trainable()
    assert len(values) > codebook.reserves
    for leaf, there in first.quantized.trainable().items():
        assert leaf == "reserved_values" or torch.equal(values[leaf], there), leaf


def test_a_codebook_that_cannot_hold_its_levels_is_refused_without_refit():
    class Fitting(KMeans):
        holds_levels = False

    with pytest.raises(ConfigError, match=r"refit=false.*Fitting.*solver.refit=true"):
        recipe(codebook=Fitting(), solver=QuantEase(refit=False))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(4, 40),
    columns=st.integers(1, 24),
    bits=st.integers(1, 4),
    start=st.sampled_from(["gptq", "nearest"]),
    weighted=st.booleans(),
)
def test_the_loss_falls_or_stays_for_any_matrix(seed, rows, columns, bits, start, weighted):
    weight, hessian = random_problem(rows, columns, seed)
    weights = None
    if weighted:
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 0.1
    losses = []
    for sweeps in (1, 2, 4):
        solver = QuantEase(start=start, sweeps=sweeps, block_size=7)
        found = solved(weight, hessian, recipe(precision=Fixed(bits), solver=solver), weights)
        losses.append(damped_loss(weight, hessian, found, 0.01, weights))
    first = solved(
        weight,
        hessian,
        recipe(precision=Fixed(bits), solver=Gptq() if start == "gptq" else Nearest()),
        weights,
    )
    losses.insert(0, damped_loss(weight, hessian, first, 0.01, weights))
    floor = 1e-6 * weight.double().square().sum().item() * hessian.diagonal().mean().item()
    assert all(after <= before * (1 + 1e-5) + floor for before, after in itertools.pairwise(losses))


def test_it_reports_the_error_of_its_outputs():
    weight, hessian = random_problem(rows=30, columns=20, seed=5)
    hessian[3] = 0
    hessian[:, 3] = 0
    found = solved(weight, hessian, recipe(solver=QuantEase()))
    missed = found.quantized.dequantize().double() - weight.double()
    whole = ((weight.double() @ hessian) * weight.double()).sum()
    assert found.output_error == pytest.approx(
        (((missed @ hessian) * missed).sum() / whole).item(), rel=1e-3
    )


def test_an_asymmetric_one_comes_nearer_to_the_original_with_every_sweep():
    problem, distances = layer(rows=24, columns=16, seed=6, tokens=400), []
    plain = recipe(precision=Fixed(3), solver=Gptq(asymmetric=1.0, damping=1e-4))
    distances.append(problem.distance(problem.solved(plain)))
    for sweeps in (1, 2, 4):
        solver = QuantEase(asymmetric=1.0, damping=1e-4, sweeps=sweeps)
        assert solver.wants == {CROSS}
        distances.append(problem.distance(problem.solved(replace(plain, solver=solver))))
    assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(distances))
    assert distances[-1] < 0.98 * distances[0]


def test_asymmetric_sweeps_lower_the_distance_to_a_share_of_the_loss():
    """A share of what was lost is the whole of a smaller loss."""
    problem = layer(rows=12, columns=9, seed=7, tokens=300)
    half = Layer(
        problem.weight,
        problem.student + 0.5 * (problem.teacher - problem.student),
        problem.student,
    )
    grid = {"codebook": Uniform(), "precision": Fixed(3)}
    one = problem.solved(recipe(**grid, solver=QuantEase(asymmetric=0.5)))
    other = half.solved(recipe(**grid, solver=QuantEase(asymmetric=1.0)))
    assert torch.equal(one.quantized.codes, other.quantized.codes)


def test_a_codebook_in_python_finds_what_the_compiled_one_finds():
    weight, hessian = random_problem(rows=40, columns=12, seed=8)

    class Interpreted(KMeans):
        def start(self, statistics, plan):
            quantizer = super().start(statistics, plan)
            quantizer.compiled = lambda: None
            return quantizer

    chosen = recipe(solver=QuantEase(sweeps=2, block_size=5))
    compiled = solved(weight, hessian, chosen).quantized
    python = solved(weight, hessian, replace(chosen, codebook=Interpreted())).quantized
    assert torch.equal(compiled.codes, python.codes)
    assert torch.equal(compiled.values, python.values)


def test_moments_that_nobody_needs_give_the_same():
    weight, hessian = random_problem(rows=20, columns=10, seed=9)
    chosen = recipe(solver=QuantEase())
    kept = solved(weight, hessian, chosen)
    problem = LinearProblem(weight, hessian)
    energy = problem.energy()
    prepared = chosen.solver.prepare(Moments(hessian.clone(), disposable=True))
    without = LinearProblem(weight, None, known_energy=energy)
    plan = MatrixPlan(chosen.codebook, chosen.plan(prepared.statistics(without)))
    found = quantize_weight(without, prepared, chosen, plan)
    assert torch.equal(found.quantized.codes, kept.quantized.codes)
    assert found.output_error == pytest.approx(kept.output_error)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"sweeps": 0}, "solver.sweeps is 0"), ({"start": "zero"}, "solver.start 'zero'")],
)
def test_what_makes_no_sense_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        QuantEase(**fields)
