"""Reserved entries that a solver moves: which they are in float64, and what they must never do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import random_problem, recipe
from test_groups_of_rows import problem as problem_of_groups
from test_groups_of_rows import true_loss
from test_quantease import damped_loss, solved

from claq_exp.errors import ConfigError
from claq_exp.payload import unpack_weight
from claq_exp.quantize.allocation import ColumnPlan, Thresholding
from claq_exp.quantize.codebook import CODEBOOK, KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import planned_layout
from claq_exp.quantize.reservation import Hessian, Iht
from claq_exp.quantize.solver import Alternating, Gptq, Nearest, QuantEase
from claq_exp.quantize.solver.columns import quantize_columns
from claq_exp.quantize.solver.descent import Descent
from claq_exp.quantize.solver.thresholds import Thresholds, largest_eigenvalue
from claq_exp.run.solve import solve_linears

RESERVING = [name for name, codebook in CODEBOOK.items() if codebook.reserves]
SHAPE = {"rows": 30, "columns": 20}


def test_the_largest_entries_are_those_of_a_full_search():
    """No column above its limit: over all choices of 4 of 9 entries, at most 2 in a column."""
    scores = torch.tensor([[5.0, 4.0, 3.5], [1.0, 2.0, 0.5], [0.0, 3.0, 0.1]])
    entries = list(itertools.product(range(3), range(3)))
    allowed = [
        choice
        for choice in itertools.combinations(entries, 4)
        if all(sum(column == at for column, _ in choice) <= 2 for at in range(3))
    ]
    best = max(allowed, key=lambda choice: sum(scores[entry].item() for entry in choice))
    found = Thresholds(4, 2, False, False).largest(scores)
    assert {tuple(entry) for entry in found.nonzero().tolist()} == set(best)
    columns = Thresholds(6, 3, True, False).largest(scores)
    assert columns.all(dim=1).tolist() == [True, True, False]
    assert int(columns.sum()) == 6


def test_equal_scores_go_to_the_first_columns_and_zeros_fill_up():
    found = Thresholds(5, 2, False, False).largest(torch.zeros(4, 3))
    assert found.sum(dim=1).tolist() == [2, 2, 1, 0]


def test_the_largest_eigenvalue_is_that_of_numpy():
    _, hessian = random_problem(rows=1, columns=30, seed=1)
    expected = np.linalg.eigvalsh(hessian.numpy())[-1]
    assert largest_eigenvalue(hessian.float()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("step", ["column", "matrix"])
@pytest.mark.parametrize("block_size", [3, 128])
def test_scores_are_those_of_float64(step, block_size):
    """An entry's best value alone, and what the loss gains on its nearest level; or one step."""
    weight, hessian = random_problem(**SHAPE, seed=2)
    hessian[4] = 0
    hessian[:, 4] = 0
    solver = QuantEase(block_size=block_size)
    prepared = solver.prepare(Moments(hessian))
    counts = torch.full((20,), 2)
    plan = ColumnPlan(torch.full((20,), 2).byte(), counts, "magnitude", Thresholding(False, step))
    importance = torch.linspace(0.5, 2, 30)
    statistics = prepared.statistics(LinearProblem(weight, hessian), importance)
    quantizer, coded = KMeans().start(statistics, plan), torch.empty(20, 30)
    quantize_columns(weight, prepared, quantizer, coded)
    first = quantizer.payload()
    stored, tables = first.dequantize().t().double().numpy(), first.values.double().numpy()
    descent = Descent(weight, prepared, quantizer, coded, importance)
    descent.hold()
    scores = descent._scores(Thresholds.of(plan))[torch.argsort(prepared.order)].numpy()
    alive = np.arange(20) != 4
    exact = hessian.numpy() + 0.01 * hessian.diagonal()[alive].mean().item() * np.eye(20)
    slope = exact @ (stored - weight.t().double().numpy())
    prices = np.diag(exact)[:, None]
    levels = stored.copy()
    for column, row in zip(first.reserved.columns().tolist(), first.reserved.rows, strict=True):
        own = tables[column]
        levels[column, row] = own[np.abs(own - stored[column, row]).argmin()]
    if step == "column":
        expected = prices * (stored - slope / prices - levels) ** 2 * importance.numpy()
    else:
        top = np.linalg.eigvalsh(exact[np.ix_(alive, alive)])[-1]
        expected = np.abs(stored - slope / top - levels)
    assert np.allclose(scores[alive], expected[alive], rtol=2e-3, atol=2e-3 * expected.max())
    assert not scores[4].any()


@pytest.mark.parametrize("whole", [False, True], ids=["entries", "columns"])
@pytest.mark.parametrize("name", RESERVING)
def test_a_matrix_takes_the_bits_of_its_plan_and_is_no_worse_than_its_start(name, whole):
    weight, hessian = random_problem(**SHAPE, seed=4)
    hessian[2] = 0
    hessian[:, 2] = 0
    kept = Iht(0.1, whole_columns=whole)
    chosen = recipe(
        codebook=CODEBOOK[name](), precision=Fixed(2), reservation=kept, solver=QuantEase(sweeps=5)
    )
    start = replace(chosen.nearest(), solver=Gptq())
    limit = damped_loss(weight, hessian, solved(weight, hessian, start), 0.01) * (1 + 1e-5)
    first, second = (solved(weight, hessian, chosen) for _ in "ab")
    assert damped_loss(weight, hessian, first, 0.01) <= limit
    found, packed = first.quantized, first.quantized.pack()
    assert torch.equal(found.dequantize(), second.quantized.dequantize())
    assert torch.equal(unpack_weight(found.layout(), packed).dequantize(), found.dequantize())
    planned = planned_layout(chosen, 30, 20)
    assert found.layout().reserved == planned.reserved == 60
    assert found.ledger().total <= planned.ledger().total
    if whole:
        assert found.ledger() == planned.ledger()
        assert sorted(found.reserved.counts.tolist()) == [0] * 18 + [30] * 2


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 40),
    columns=st.integers(1, 24),
    ratio=st.floats(0, 1),
    whole=st.booleans(),
    step=st.sampled_from(["column", "matrix"]),
    every=st.sampled_from([0, 3]),
)
def test_the_loss_falls_or_stays_for_any_matrix(seed, rows, columns, ratio, whole, step, every):
    weight, hessian = random_problem(rows, columns, seed)
    kept = Iht(ratio, whole_columns=whole, step=step)
    losses = []
    for sweeps in (1, 4) if every else (1, 2, 4):
        solver = QuantEase(sweeps=sweeps, block_size=7, escape_every=every if sweeps > 2 else 0)
        chosen = recipe(precision=Fixed(2), reservation=kept, solver=solver)
        found = solved(weight, hessian, chosen)
        losses.append(damped_loss(weight, hessian, found, 0.01))
        assert int(found.quantized.reserved.counts.sum()) == int(
            chosen.plan(
                solver.prepare(Moments(hessian)).statistics(LinearProblem(weight, hessian))
            ).reserved_counts.sum()
        )
    floor = 1e-6 * weight.double().square().sum().item() * hessian.diagonal().mean().item()
    assert all(after <= before * (1 + 1e-5) + floor for before, after in itertools.pairwise(losses))


def test_moving_entries_pays_and_they_do_move():
    losses = {Hessian: 0.0, Iht: 0.0}
    moved = 0
    for seed in range(5):
        weight, hessian = random_problem(rows=60, columns=30, seed=seed)
        places = []
        for rule in losses:
            chosen = recipe(precision=Fixed(2), reservation=rule(0.03), solver=QuantEase(sweeps=6))
            found = solved(weight, hessian, chosen)
            losses[rule] += damped_loss(weight, hessian, found, 0.01)
            kept = found.quantized.reserved
            places.append(set(zip(kept.columns().tolist(), kept.rows.tolist(), strict=True)))
        moved += len(places[1] - places[0])
    assert losses[Iht] < 0.97 * losses[Hessian]
    assert moved > 20


def test_without_refit_entries_move_and_levels_stay():
    weight, hessian = random_problem(rows=60, columns=30, seed=1)
    chosen = recipe(precision=Fixed(2), reservation=Iht(0.03), solver=QuantEase(refit=False))
    start = recipe(precision=Fixed(2), reservation=Hessian(0.03))
    first, found = (solved(weight, hessian, each) for each in (start, chosen))
    assert torch.equal(found.quantized.values, first.quantized.values)
    counts = [each.quantized.reserved.counts for each in (first, found)]
    assert not torch.equal(*counts)
    assert damped_loss(weight, hessian, found, 0.01) < damped_loss(weight, hessian, first, 0.01)


def test_groups_of_rows_have_their_own_hessians():
    weight, moments = problem_of_groups(2)
    chosen = recipe(precision=Fixed(2), reservation=Iht(0.05), solver=QuantEase(sweeps=5))
    start = replace(chosen, reservation=Hessian(0.05), solver=Gptq())
    losses = []
    for each in (start, chosen):
        ((found, _),) = solve_linears({"layer": weight}, moments, each)
        losses.append(true_loss(weight, moments, found, 0.01))
    assert losses[1] < losses[0]


def test_a_hessian_that_is_not_positive_is_rounded_to_nearest_with_what_is_planned():
    weight, hessian = random_problem(rows=20, columns=8, seed=6)
    bad = hessian.clone()
    bad[0, 1] = bad[1, 0] = 100 * hessian.diagonal().max()
    chosen = recipe(reservation=Iht(0.1), solver=QuantEase())
    ((found, _),) = solve_linears({"layer": weight}, Moments(bad), chosen)
    assert found.nearest == "indefinite"
    assert int(found.quantized.reserved.counts.sum()) == 16


@pytest.mark.parametrize("solver", [Gptq(), Nearest(), Alternating()], ids=str)
def test_other_solvers_are_refused_with_what_to_take(solver):
    with pytest.raises(ConfigError, match=r"reservation=iht.*solver=quantease"):
        recipe(reservation=Iht(), solver=solver)


def test_levels_that_nobody_fits_again_are_no_levels_of_a_column_that_was_reserved():
    with pytest.raises(ConfigError, match=r"whole_columns=true.*solver.refit=true"):
        recipe(reservation=Iht(whole_columns=True), solver=QuantEase(refit=False))


def test_an_unknown_step_is_refused():
    with pytest.raises(ConfigError, match=r"reservation.step 'leap'"):
        Iht(step="leap")


def test_a_codebook_that_reserves_nothing_is_refused():
    with pytest.raises(ConfigError, match="cannot leave entries out"):
        recipe(codebook=CODEBOOK["uniform"](), reservation=Iht(), solver=QuantEase())
