"""Solvers with a Hessian for each group of rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from quantize_references import explicit_obs, random_problem, recipe
from torch import Tensor

from claq_exp.quantize.codebook import CODEBOOK, KMeans, Uniform
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, QuantEase
from claq_exp.quantize.solver.base import Solved
from claq_exp.quantize.statistics import ColumnStatistics
from claq_exp.run.solve import solve_linears

ROWS, COLUMNS = 24, 18
GRID = {"codebook": Uniform(), "precision": Fixed(2)}


def problem(groups: int, seed: int = 0) -> tuple[Tensor, Moments]:
    """A weight, and Hessians and cross moments of groups, some of them 10 times as large."""
    weight, _ = random_problem(ROWS, COLUMNS, seed)
    hessians, crosses = [], []
    for group in range(groups):
        _, hessian = random_problem(ROWS, COLUMNS, seed + 1 + group)
        hessians.append(hessian * (10.0 if group else 1.0))
        crosses.append(0.1 * random_problem(COLUMNS, COLUMNS, seed + 9 + group)[0].double())
    return weight, Moments(torch.stack(hessians), torch.stack(crosses), 99)


def solved(weight: Tensor, moments: Moments, chosen: Recipe) -> Solved:
    ((found, _),) = solve_linears({"layer": weight}, moments, chosen)
    return found


@pytest.mark.parametrize(
    "solver",
    [
        Gptq(act_order=False),
        Gptq(act_order=False, block_size=5, asymmetric=0.5),
        QuantEase(act_order=False, block_size=4),
        QuantEase(act_order=False, start="nearest", asymmetric=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [2, 4])
def test_on_grids_of_rows_each_group_is_a_matrix_of_its_own(solver, groups):
    weight, moments = problem(groups)
    whole = solved(weight, moments, recipe(**GRID, solver=solver))
    parts = [
        solved(
            own,
            Moments(moments.hessian[group], moments.cross[group]),
            recipe(**GRID, solver=solver),
        )
        for group, own in enumerate(weight.chunk(groups))
    ]
    assert torch.equal(whole.quantized.codes, torch.cat([part.quantized.codes for part in parts]))


def true_loss(weight: Tensor, moments: Moments, found: Solved, damping: float = 0.0) -> float:
    """The sum of tr(D H D^T) over groups, in float64."""
    missed = (found.quantized.dequantize() - weight).double().chunk(moments.groups)
    total = 0.0
    for own, hessian in zip(missed, moments.hessian, strict=True):
        damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
        total += float(((own @ damped) * own).sum())
    return total


@pytest.mark.parametrize("solver", [Gptq(), Gptq(asymmetric=0.5), QuantEase()], ids=str)
@pytest.mark.parametrize("disposable", [False, True])
def test_the_error_of_the_outputs_is_that_of_all_groups(solver, disposable):
    weight, moments = problem(3)
    kept = Moments(moments.hessian.clone(), moments.cross.clone())
    found = solved(weight, replace(moments, disposable=disposable), recipe(solver=solver))
    whole = sum(
        float(((own.double() @ hessian) * own.double()).sum())
        for own, hessian in zip(weight.chunk(3), kept.hessian, strict=True)
    )
    assert found.output_error == pytest.approx(true_loss(weight, kept, found) / whole, rel=1e-3)


@pytest.mark.parametrize("solver", [Gptq(), Gptq(asymmetric=0.5), QuantEase()], ids=str)
@pytest.mark.parametrize(
    "name", ["kmeans", "kmeans_exact", "quantile", "sklearn_kmeans", "uniform"]
)
def test_groups_that_are_alike_change_nothing(solver, name):
    weight, moments = problem(1)
    alike = Moments(moments.hessian.repeat(2, 1, 1), moments.cross.repeat(2, 1, 1))
    codebook = CODEBOOK[name]()
    changes = {"reservation": FixedReservation(0.1)} if codebook.reserves else {}
    chosen = recipe(codebook=codebook, solver=solver, **changes)
    one, two = solved(weight, moments, chosen), solved(weight, alike, chosen)
    for suffix, tensor in one.quantized.pack().items():
        assert torch.equal(two.quantized.pack()[suffix], tensor), suffix


def test_a_column_is_fitted_with_the_price_of_an_error_in_each_group():
    """By explicit removal of one column after another, in float64, with weighted k-means."""
    weight, moments = problem(2, seed=5)
    exact = [
        hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS).double()
        for hessian in moments.hessian
    ]
    order = torch.argsort(-moments.hessian.diagonal(dim1=1, dim2=2).mean(dim=0)).tolist()
    found = solved(weight, Moments(moments.hessian), recipe(codebook=KMeans(), precision=Fixed(2)))
    levels = found.quantized.levels()
    seen: list[np.ndarray] = []
    stored = found.quantized.dequantize().double().numpy()
    for own, hessian, rows in zip(weight.chunk(2), exact, np.split(stored, 2), strict=True):
        _, compensated = explicit_obs(
            own, hessian.numpy(), order, lambda column, _, rows=rows: rows[:, column]
        )
        seen.append(compensated)
    values = np.concatenate(seen).astype(np.float32)
    for place, column in enumerate(order):
        left = order[place:]
        prices = [1 / np.linalg.inv(h.numpy()[np.ix_(left, left)])[0, 0] for h in exact]
        centroids = np.empty(4)
        fit_levels(
            values[:, column].copy(), np.repeat(prices, ROWS // 2).astype(np.float32), centroids
        )
        assert np.allclose(levels[column], centroids, rtol=2e-3, atol=2e-3), column


@pytest.mark.parametrize("name", ["kmeans", "kmeans_shared", "sklearn_kmeans", "uniform"])
def test_no_sweep_raises_the_loss_of_all_groups(name):
    codebook = KMeans(shared=True) if name == "kmeans_shared" else CODEBOOK[name]()
    weight, moments = problem(4, seed=7)
    moments.hessian[:, 2] = 0
    moments.hessian[:, :, 2] = 0
    chosen = recipe(codebook=codebook, precision=Fixed(2))
    plain = Moments(moments.hessian)
    losses = [true_loss(weight, plain, solved(weight, plain, chosen), 0.01)]
    for sweeps in (1, 2, 5):
        found = solved(weight, plain, replace(chosen, solver=QuantEase(sweeps=sweeps)))
        losses.append(true_loss(weight, plain, found, 0.01))
    assert found.dead_columns == 1
    assert all(after <= before * (1 + 1e-2) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_an_own_hessian_for_each_group_lowers_what_is_minimized():
    losses = {1: 0.0, 2: 0.0}
    for seed in range(3):
        weight, moments = problem(2, seed=10 + seed)
        for groups in losses:
            given = Moments(moments.hessian if groups == 2 else moments.single())
            losses[groups] += true_loss(weight, moments, solved(weight, given, recipe()))
    assert losses[2] < 0.8 * losses[1]


def test_what_strategies_know_of_groups_is_what_each_row_costs():
    weight, moments = problem(2)
    prepared = Gptq().prepare(Moments(moments.hessian))
    rows = torch.rand(ROWS) + 0.5
    known = prepared.statistics(LinearProblem(weight, moments.single()), rows)
    costs = known.distortion_weight * known.group_shares
    for part, own in zip(prepared.parts, costs, strict=True):
        assert torch.allclose(own, part.distortion_weight)
    assert torch.allclose(known.row_weights.view(2, -1).mean(dim=1), torch.ones(2))
    by_hand = (weight.square() * costs.repeat_interleave(ROWS // 2, dim=0)).mean(dim=0)
    assert torch.allclose(known.sensitivity(), by_hand)
    plain = ColumnStatistics(weight, known.distortion_weight, known.order)
    assert not torch.allclose(plain.sensitivity(), by_hand)


def test_the_price_of_rows_tables_is_the_mean_diagonal_of_groups():
    _, moments = problem(3)
    expected = moments.single().diagonal().float()
    prepared = Gptq().prepare(moments)
    assert torch.allclose(prepared.diagonal, expected)
