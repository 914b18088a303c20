"""Alternation of levels and codes: closed forms against numpy's least squares, and the loss."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import random_problem, recipe
from test_asymmetric_gptq import layer
from test_quantease import damped_loss, solved
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.payload import ColumnCodebooks, RowCodebooks, unpack_weight
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.codebook import CODEBOOK, KMeans, KMeansExact, RowKMeans
from claq_exp.quantize.moments import CROSS, Moments
from claq_exp.quantize.precision import Fixed, OutlierOrder
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import quantize_weight
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Alternating, Gptq, Nearest, QuantEase, level_fits
from claq_exp.quantize.solver.level_fits import Assignment, column_steps, row_steps

BOOKS = {
    "columns": KMeans(),
    "columns, exact": KMeansExact(),
    "columns, row scales": KMeans(row_scales=True),
    "rows": RowKMeans(),
}


def assigned(
    rows: int, columns: int, entries: int, seed: int
) -> tuple[Assignment, Tensor, Tensor, Tensor]:
    """A random assignment with entries that are not free: (it, W, levels of rows, found)."""
    weight, hessian = random_problem(rows, columns, seed)
    dice = torch.Generator().manual_seed(seed)
    codes = torch.randint(entries, (columns, rows), generator=dice)
    free = torch.rand(columns, rows, generator=dice) < 0.9
    found = torch.randn(columns, rows, generator=dice)
    levels = torch.randn(rows, entries, generator=dice)
    return Assignment(hessian.float(), codes, free), weight, levels, found


def loss(found: np.ndarray, weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """tr(d H d^T) of each row, in float64: [out, in] -> [out]."""
    missed = found - weight
    return ((missed @ hessian) * missed).sum(axis=1)


def test_levels_of_rows_are_those_of_least_squares():
    """One row's unknowns are its levels; an empty level stays."""
    found, weight, levels, kept = assigned(rows=6, columns=40, entries=4, seed=1)
    found.codes[:, 2][found.codes[:, 2] == 3] = 0
    stored = torch.where(found.free, levels.gather(1, found.codes.t()).t(), kept)
    slope = found.hessian @ (stored - weight.t())
    steps = row_steps(found, slope, 4).numpy()
    root = np.linalg.cholesky(found.hessian.double().numpy())
    for row in range(6):
        free = found.free[:, row].numpy()
        design = np.eye(4)[found.codes[:, row].numpy()] * free[:, None]
        fixed = np.where(free, 0.0, kept[:, row].double().numpy())
        target = weight[row].double().numpy() - fixed
        best, *_ = np.linalg.lstsq(root.T @ design, root.T @ target, rcond=None)
        used = design.any(axis=0)
        assert (levels[row].double().numpy() + steps[row])[used] == pytest.approx(
            best[used], rel=1e-3, abs=1e-4
        )
        assert (steps[row][~used] == 0).all()
    assert (steps[2] == 0).sum() == 1


@pytest.mark.parametrize("weighted", [False, True])
def test_levels_of_columns_are_those_of_least_squares_over_all_columns(weighted, monkeypatch):
    """All levels of the matrix are unknowns of one system; rows may have scales and weights."""
    monkeypatch.setattr(level_fits, "STEPS", 200)
    rows, columns, entries = 25, 9, 4
    found, weight, _, kept = assigned(rows, columns, entries, seed=2)
    dice = torch.Generator().manual_seed(3)
    levels = torch.randn(columns, entries, generator=dice)
    scales, importance = torch.ones(rows), torch.ones(rows)
    if weighted:
        scales, importance = (torch.rand(rows, generator=dice) + 0.5 for _ in range(2))
    stored = torch.where(found.free, levels.gather(1, found.codes) * scales, kept)
    slope = found.hessian @ (stored - weight.t())
    steps = column_steps(found, slope, entries, scales, importance)

    hessian = found.hessian.double().numpy()
    root = np.linalg.cholesky(hessian)
    free = found.free.t().numpy()
    design = np.zeros((rows, columns, columns, entries))
    for row, column in itertools.product(range(rows), range(columns)):
        if free[row, column]:
            design[row, column, column, found.codes[column, row]] = scales[row]
    fixed = np.where(free, 0.0, kept.t().double().numpy())
    share = importance.double().sqrt().numpy()
    left = np.einsum("r,cd,rcjk->rdjk", share, root, design).reshape(rows * columns, -1)
    right = (share[:, None] * ((weight.double().numpy() - fixed) @ root)).reshape(-1)
    best, *_ = np.linalg.lstsq(left, right, rcond=None)

    def total(table: np.ndarray) -> float:
        values = fixed + np.einsum("rcjk,jk->rc", design, table)
        return float(importance.double().numpy() @ loss(values, weight.double().numpy(), hessian))

    least, before = total(best.reshape(columns, entries)), total(levels.double().numpy())
    after = total(levels.double().numpy() + steps.numpy())
    assert least * (1 - 1e-6) <= after <= least + 1e-3 * (before - least)


@pytest.mark.parametrize("name", BOOKS)
def test_no_code_and_no_table_alone_can_be_better_in_the_end(name):
    """Where alternation ends, every single code is the best, and so are all levels together."""
    weight, hessian = random_problem(rows=12, columns=10, seed=4)
    solver = Alternating(rounds=30, sweeps=30)
    found = solved(weight, hessian, recipe(codebook=BOOKS[name], precision=Fixed(2), solver=solver))
    dense = found.quantized.dequantize().double().numpy()
    exact = hessian.numpy() + 0.01 * hessian.diagonal().mean().item() * np.eye(10)
    weights = weight.double().numpy()
    reached = loss(dense, weights, exact)
    choices = found.quantized.values.double().numpy()
    scales = getattr(found.quantized, "row_scales", None)
    for row, column in itertools.product(range(12), range(10)):
        table = choices[row] if name == "rows" else choices[column]
        if scales is not None:
            table = table * scales[row].item()
        for level in table:
            tried = dense[row].copy()
            tried[column] = level
            assert loss(tried[None], weights[[row]], exact)[0] >= reached[row] * (1 - 1e-3)


@pytest.mark.parametrize("name", BOOKS)
def test_no_round_raises_the_loss_and_the_start_is_never_better(name):
    weight, hessian = random_problem(rows=40, columns=30, seed=5)
    hessian[2] = 0
    hessian[:, 2] = 0
    chosen = recipe(
        codebook=BOOKS[name], precision=Fixed(2), reservation=FixedReservation(0.1), solver=Gptq()
    )
    losses = [damped_loss(weight, hessian, solved(weight, hessian, chosen), 0.01)]
    for rounds in (1, 2, 4):
        found = solved(weight, hessian, replace(chosen, solver=Alternating(rounds=rounds)))
        losses.append(damped_loss(weight, hessian, found, 0.01))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert found.dead_columns == 1
    packed, dense = found.quantized.pack(), found.quantized.dequantize()
    again = unpack_weight(found.quantized.layout(), packed)
    assert torch.equal(again.dequantize(), dense)
    assert bool((found.quantized.values.diff(dim=1) >= 0).all())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(4, 40),
    columns=st.integers(1, 24),
    bits=st.integers(1, 4),
    start=st.sampled_from(["gptq", "nearest"]),
    name=st.sampled_from(list(BOOKS)),
    weighted=st.booleans(),
)
def test_the_loss_falls_or_stays_for_any_matrix(seed, rows, columns, bits, start, name, weighted):
    weight, hessian = random_problem(rows, columns, seed)
    weights = None
    if weighted:
        weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) + 0.1
    plain = recipe(codebook=BOOKS[name], precision=Fixed(bits))
    first = replace(plain, solver=Gptq() if start == "gptq" else Nearest())
    losses = [damped_loss(weight, hessian, solved(weight, hessian, first, weights), 0.01, weights)]
    for rounds in (1, 2, 3):
        solver = Alternating(start=start, rounds=rounds, sweeps=2, block_size=7)
        found = solved(weight, hessian, replace(plain, solver=solver), weights)
        losses.append(damped_loss(weight, hessian, found, 0.01, weights))
    floor = 1e-6 * weight.double().square().sum().item() * hessian.diagonal().mean().item()
    assert all(after <= before * (1 + 1e-5) + floor for before, after in itertools.pairwise(losses))


def test_widths_and_reserved_entries_are_those_of_the_plan():
    weight, hessian = random_problem(rows=60, columns=24, seed=6)
    chosen = recipe(
        precision=OutlierOrder(low_bits=2, high_bits=4, target_bits=2.5),
        reservation=FixedReservation(0.05),
        solver=Alternating(),
    )
    problem, prepared = LinearProblem(weight, hessian), chosen.solver.prepare(Moments(hessian))
    plan = chosen.plan(prepared.statistics(problem))
    found = quantize_weight(problem, prepared, chosen).quantized
    assert torch.equal(found.column_bits, plan.column_bits)
    assert torch.equal(found.reserved.counts, plan.reserved_counts)
    assert bool((found.codes < 2 ** plan.column_bits.int()).all())
    assert bool((found.codes[found.reserved.rows, found.reserved.columns()] == 0).all())
    unused = torch.arange(16) >= 2 ** plan.column_bits[:, None].int()
    assert not bool(found.values[unused].any())


def test_reserved_entries_take_their_best_value():
    """An entry that is no code is worth W minus what its neighbours have missed, to float16."""
    weight, hessian = random_problem(rows=20, columns=10, seed=7)
    solver = Alternating(rounds=30, sweeps=30)
    chosen = recipe(
        codebook=RowKMeans(),
        precision=Fixed(2),
        reservation=FixedReservation(0.05),
        solver=solver,
    )
    found = solved(weight, hessian, chosen).quantized
    missed = found.dequantize().double() - weight.double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(10).double()
    slope = (missed @ damped) / damped.diagonal()
    at = found.reserved.rows, found.reserved.columns()
    assert bool((slope[at].abs() <= 2.0**-9 * (1 + found.reserved.values.double().abs())).all())


@pytest.mark.parametrize("form", [ColumnCodebooks, RowCodebooks])
def test_the_same_problem_gives_the_same_bits(form):
    weight, hessian = random_problem(rows=30, columns=20, seed=8)
    codebook = KMeans() if form is ColumnCodebooks else RowKMeans()
    chosen = recipe(codebook=codebook, solver=Alternating())
    first, second = (solved(weight, hessian, chosen).quantized for _ in range(2))
    assert isinstance(first, form)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.values, second.values)


def test_a_codebook_that_an_allocation_shared_gets_the_sweeps_alone():
    weight, hessian = random_problem(rows=40, columns=20, seed=9)
    problem, shared = LinearProblem(weight, hessian), KMeans(shared=True)
    dense = []
    for solver in (Alternating(sweeps=2), QuantEase(sweeps=2)):
        prepared = solver.prepare(Moments(hessian))
        columns = recipe().plan(prepared.statistics(problem))
        found = solver.solve(problem, prepared, MatrixPlan(shared, columns))
        dense.append(found.quantized.dequantize())
    assert torch.equal(*dense)


@pytest.mark.parametrize("name", ["columns", "rows"])
def test_an_asymmetric_one_comes_nearer_to_the_original_with_every_round(name):
    problem, distances = layer(rows=24, columns=16, seed=6, tokens=400), []
    fields = {"asymmetric": 1.0, "damping": 1e-4}
    plain = recipe(codebook=BOOKS[name], precision=Fixed(2), solver=Gptq(**fields))
    distances.append(problem.distance(problem.solved(plain)))
    for rounds in (1, 2, 4):
        solver = Alternating(rounds=rounds, **fields)
        assert solver.wants == {CROSS}
        distances.append(problem.distance(problem.solved(replace(plain, solver=solver))))
    assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(distances))
    assert distances[-1] < 0.95 * distances[0]


@pytest.mark.parametrize("name", CODEBOOK)
def test_a_codebook_without_free_levels_is_refused_with_what_to_take(name):
    codebook = CODEBOOK[name]()
    assert codebook.free_levels == (name in {"kmeans", "kmeans_exact", "row_kmeans"})
    if not codebook.free_levels:
        with pytest.raises(ConfigError, match=r"not free.*codebook=kmeans.*solver=quantease"):
            recipe(codebook=codebook, solver=Alternating())
    with pytest.raises(ConfigError, match="not free"):
        recipe(codebook=KMeans(shared=True), solver=Alternating())


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"solver\.rounds is 0"):
        Alternating(rounds=0)
