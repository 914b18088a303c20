"""Codebooks of rows: fits against scikit-learn and brute force, the loop against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantize_references import (
    Led,
    best_error,
    damped,
    explicit_obs,
    random_problem,
    recipe,
    solve,
    squared_error,
)
from sklearn.cluster import KMeans as SklearnMeans

from claq_exp.errors import ConfigError
from claq_exp.payload import RowCodebooks
from claq_exp.quantize.codebook import RowKMeans
from claq_exp.quantize.codebook.row_kmeans import column_weights
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.precision.outlier_order import OutlierOrder
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Gptq, Nearest, QuantEase


def levels_of(weight: torch.Tensor, hessian: torch.Tensor, chosen) -> np.ndarray:
    """The tables that a codebook begins with: [out, 2**bits]."""
    prepared = chosen.solver.prepare(Moments(hessian))
    statistics = prepared.statistics(LinearProblem(weight, hessian))
    return chosen.codebook.start(statistics, chosen.plan(statistics)).payload().values.numpy()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_fit_of_a_row_is_no_worse_than_scikit_learns(bits):
    weight, hessian = random_problem(rows=6, columns=300, seed=1)
    chosen = recipe(codebook=RowKMeans(exact=True), precision=Fixed(bits))
    prices = chosen.solver.prepare(Moments(hessian)).distortion_weight
    mass = column_weights(prices, 3.0).double().numpy()
    exact = levels_of(weight, hessian, chosen)
    near = levels_of(weight, hessian, recipe(codebook=RowKMeans(), precision=Fixed(bits)))
    for row, values in enumerate(weight.numpy()):
        means = SklearnMeans(2**bits, n_init=5, random_state=0)
        means.fit(values[:, None], sample_weight=mass)
        found = squared_error(values, exact[row], mass)
        assert found <= 1.001 * squared_error(values, means.cluster_centers_[:, 0], mass)
        assert squared_error(values, near[row], mass) <= 1.03 * found


@pytest.mark.parametrize("bits", [1, 2])
def test_the_exact_fit_is_the_best_of_all_partitions(bits):
    weight, hessian = random_problem(rows=5, columns=11, seed=2)
    chosen = recipe(
        codebook=RowKMeans(exact=True, price="diagonal", power=2.0), precision=Fixed(bits)
    )
    mass = hessian.diagonal().numpy()
    for values, levels in zip(weight.numpy(), levels_of(weight, hessian, chosen), strict=True):
        best = best_error(values, 2**bits, mass)
        assert squared_error(values, levels, mass) == pytest.approx(best, rel=1e-2, abs=1e-5)


def test_each_column_is_coded_as_in_float64():
    """The loop of GPTQ in float64, whose levels are the tables that were fitted before."""
    weight, hessian = random_problem(rows=30, columns=12, seed=3)
    codebook = RowKMeans()
    chosen = recipe(codebook=codebook, solver=Gptq(act_order=False, block_size=5))
    levels = levels_of(weight, hessian, chosen).astype(np.float64)

    def nearest(column: int, values: np.ndarray) -> np.ndarray:
        places = np.abs(values[:, None] - levels).argmin(axis=1)
        return levels[np.arange(len(values)), places]

    expected, compensated = explicit_obs(weight, damped(hessian, 0.01), range(12), nearest)
    led = recipe(codebook=Led(codebook, compensated), solver=chosen.solver)
    found = solve(weight, hessian, led).quantized.dequantize().double().numpy()
    misses = np.abs(compensated - found) - np.abs(compensated - expected)
    assert misses.max() <= 1e-5  # where two levels are as near, either will do


@pytest.mark.parametrize("solver", [Gptq(), Nearest(), QuantEase()], ids=str)
def test_a_row_has_its_own_levels_and_costs_what_they_take(solver):
    weight, hessian = random_problem(rows=20, columns=64, seed=4)
    chosen = recipe(codebook=RowKMeans(), precision=Fixed(2), solver=solver)
    found = solve(weight, hessian, chosen).quantized
    assert isinstance(found, RowCodebooks)
    assert found.values.shape == (20, 4)
    ledger = found.ledger()
    assert ledger.codes == 2 * 20 * 64
    assert ledger.codebooks == 16 * 4 * 20
    assert ledger.total / (20 * 64) == 2 + 16 * 4 / 64


def test_reserved_entries_are_left_out_of_the_fit():
    weight, hessian = random_problem(rows=20, columns=40, seed=5)
    weight[7, 3] = 500.0
    rules = {"reservation": FixedReservation(0.05), "solver": Nearest(), "precision": Fixed(2)}
    found = solve(weight, hessian, recipe(codebook=RowKMeans(), **rules)).quantized
    assert float(found.dequantize()[7, 3]) == 500.0
    assert float(found.values.abs().max()) < 10
    together = recipe(codebook=RowKMeans(fit_reserved=True), **rules)
    assert float(solve(weight, hessian, together).quantized.values.abs().max()) > 400


def test_what_an_error_costs_is_the_weight_of_a_column():
    weight, hessian = random_problem(rows=200, columns=60, seed=6)
    price, plain = torch.rand(60) ** 4 + 1e-3, {"precision": Fixed(2), "solver": Nearest()}
    hessian = torch.diag(price).double()
    errors = [
        solve(weight, hessian, recipe(codebook=RowKMeans(power=power), **plain)).output_error
        for power in (2.0, 0.0)
    ]
    assert errors[0] < 0.9 * errors[1]
    assert column_weights(price, 0.0).tolist() == [1.0] * 60
    assert column_weights(torch.zeros(3), 3.0).tolist() == [1.0] * 3
    assert column_weights(torch.tensor([4.0, 0.0, 1.0]), 2.0).tolist() == [1.0, 0.25, 0.25]


def test_the_diagonal_is_that_of_the_hessian_whatever_the_solver():
    weight, hessian = random_problem(rows=10, columns=30, seed=7)
    codebook = RowKMeans(price="diagonal", power=2.0)
    ours, plain = (
        levels_of(weight, hessian, recipe(codebook=codebook, solver=solver))
        for solver in (Gptq(), Nearest())
    )
    assert np.array_equal(ours, plain)
    other = levels_of(weight, hessian, recipe(codebook=RowKMeans(power=2.0)))
    assert not np.array_equal(ours, other)


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"price": "low"}, "codebook.price 'low'"), ({"power": -1.0}, "codebook.power is -1")],
)
def test_what_makes_no_sense_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        RowKMeans(**fields)


def test_columns_of_several_widths_are_refused():
    with pytest.raises(ConfigError, match="one width for all columns"):
        recipe(codebook=RowKMeans(), precision=OutlierOrder())
