"""Sweeps that leave columns unrounded: what they do in float64, and that the best is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import damped, random_problem, recipe
from test_groups_of_rows import problem as problem_of_groups
from test_quantease import BITS, damped_loss, solved

from claq_exp.errors import ConfigError
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook import CODEBOOK, KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import QuantEase
from claq_exp.quantize.solver.columns import quantize_columns
from claq_exp.quantize.solver.descent import Descent


def started(weight, moments, solver, rows=None) -> Descent:
    """Quantize by the column loop, in 2 bits, and begin a descent from there."""
    prepared = solver.prepare(moments)
    columns = weight.shape[1]
    plan = ColumnPlan(torch.full((columns,), 2, dtype=torch.uint8), torch.zeros(columns).long())
    statistics = prepared.statistics(LinearProblem(weight, moments.hessian), rows)
    quantizer, coded = KMeans().start(statistics, plan), torch.empty(weight.t().shape)
    quantize_columns(weight, prepared, quantizer, coded)
    return Descent(weight, prepared, quantizer, coded, statistics.importance())


@pytest.mark.parametrize("block_size", [1, 3, 128])
def test_a_relaxed_sweep_is_one_of_gauss_and_seidel(block_size):
    weight, hessian = random_problem(rows=7, columns=20, seed=1)
    descent = started(weight, Moments(hessian), QuantEase(block_size=block_size, act_order=False))
    exact, target = damped(hessian, 0.01), weight.double().numpy()
    expected = descent.found.t().double().numpy().copy()
    for _ in range(2):
        for column in range(20):
            slope = (expected - target) @ exact[:, column]
            expected[:, column] -= slope / exact[column, column]
        before = descent.objective()
        descent.relax()
        assert np.allclose(descent.found.t().numpy(), expected, atol=1e-4)
        assert descent.objective() < before


@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("swept", [False, True])
def test_the_objective_is_that_of_all_rows_as_they_weigh(asymmetric, groups, swept):
    weight, moments = problem_of_groups(groups)
    rows = torch.linspace(0.5, 2, len(weight))
    solver = QuantEase(asymmetric=asymmetric, act_order=False, block_size=2)
    descent = started(weight, moments, solver, rows)
    if swept:
        descent.sweep()
    expected = 0.0
    missed = (descent.found.t() - weight).double()
    for part, own in enumerate(missed.chunk(groups)):
        exact = torch.from_numpy(damped(moments.hessian[part], 0.01))
        losses = ((own @ exact) * own).sum(dim=1)
        wanted = weight.chunk(groups)[part].double() @ moments.cross[part] * asymmetric
        losses -= 2 * (wanted * own).sum(dim=1)
        expected += float((losses * descent.importance.chunk(groups)[part]).sum())
    assert descent.objective() == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("name", CODEBOOK)
def test_what_was_best_before_an_escape_is_never_lost(name):
    codebook = CODEBOOK[name]()
    weight, hessian = random_problem(rows=30, columns=20, seed=4)
    changes = {"reservation": FixedReservation(0.1)} if codebook.reserves else {}
    chosen = recipe(codebook=codebook, precision=Fixed(BITS.get(name, 2)), **changes)
    once = solved(weight, hessian, replace(chosen, solver=QuantEase(sweeps=1)))
    limit = damped_loss(weight, hessian, once, 0.01) * (1 + 1e-5)
    for sweeps in (3, 8):
        solver = QuantEase(sweeps=sweeps, escape_every=3)
        first, second = (solved(weight, hessian, replace(chosen, solver=solver)) for _ in "ab")
        assert damped_loss(weight, hessian, first, 0.01) <= limit
        assert torch.equal(first.quantized.dequantize(), second.quantized.dequantize())
        missed = first.quantized.dequantize().double() - weight.double()
        whole = ((weight.double() @ hessian) * weight.double()).sum()
        error = float(((missed @ hessian) * missed).sum() / whole)
        assert first.output_error == pytest.approx(error, rel=1e-3)  # of what is stored


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(4, 40),
    columns=st.integers(1, 24),
    bits=st.integers(1, 4),
    refit=st.booleans(),
    every=st.integers(2, 4),
)
def test_escapes_never_end_above_their_start(seed, rows, columns, bits, refit, every):
    weight, hessian = random_problem(rows, columns, seed)
    plain = recipe(precision=Fixed(bits))
    solver = QuantEase(sweeps=7, escape_every=every, block_size=3, refit=refit)
    first, found = (
        damped_loss(weight, hessian, solved(weight, hessian, chosen), 0.01)
        for chosen in (plain, replace(plain, solver=solver))
    )
    floor = 1e-6 * weight.double().square().sum().item() * hessian.diagonal().mean().item()
    assert found <= first * (1 + 1e-5) + floor


def test_escapes_leave_local_optima():
    """On a sum over problems: for one of them an escape may find nothing better."""
    losses = {0: 0.0, 3: 0.0}
    for seed in range(6):
        weight, hessian = random_problem(rows=40, columns=30, seed=seed)
        for every in losses:
            chosen = recipe(precision=Fixed(2), solver=QuantEase(sweeps=30, escape_every=every))
            found = solved(weight, hessian, chosen)
            losses[every] += damped_loss(weight, hessian, found, 0.01)
    assert losses[3] < 0.98 * losses[0]


@pytest.mark.parametrize(
    ("sweeps", "every", "relaxed"),
    [
        (30, 3, [1, 4, 7, 10, 13, 16, 19, 22]),  # QuantEase's
        (3, 3, [1]),
        (7, 2, [1, 3]),
        (9, 0, []),
    ],
)
def test_which_sweeps_are_relaxed(sweeps, every, relaxed):
    assert list(QuantEase(sweeps=sweeps, escape_every=every).relaxed) == relaxed


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"escape_every": 1}, "escape_every is 1"),
        ({"escape_every": -3}, "escape_every is -3"),
        ({"escape_every": 3, "sweeps": 2}, "at least 3 sweeps"),
    ],
)
def test_escapes_without_room_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        QuantEase(**fields)
