"""The bug-for-bug members against a literal rewriting of what the reference code does, in loops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from quantize_references import Led, damped, explicit_obs, random_problem, recipe, solve
from sklearn.cluster import KMeans as ReferenceKMeans
from threadpoolctl import threadpool_limits

from claq_exp.errors import ConfigError
from claq_exp.quantize.codebook import SklearnKMeans
from claq_exp.quantize.precision import ClaqReference as Precision
from claq_exp.quantize.recipe import planned_layout
from claq_exp.quantize.reservation import ClaqReference as Reservation
from claq_exp.quantize.solver import Gptq
from claq_exp.quantize.statistics import ColumnStatistics


def outlier_order(permuted: np.ndarray) -> list[int]:
    """Positions by falling count of entries that reach 13 times the mean, a stable sort."""
    mean = np.abs(permuted).mean()
    counts = [sum(abs(w) >= 13 * mean for w in column) for column in permuted.T]
    return sorted(range(len(counts)), key=lambda position: -counts[position])


def bits_of_positions(permuted: np.ndarray, target: float) -> list[int]:
    columns = permuted.shape[1]
    low, share = (2, (target - 2) / 2) if target < 3 else (3, target - 3)
    bits = [low] * columns
    for position in outlier_order(permuted)[: round(columns * share)]:
        bits[position] = 4
    return bits


def rates_of_positions(permuted: np.ndarray) -> list[float]:
    """The rate that the block loop looks up: that of the position inside the block (Q1)."""
    columns = permuted.shape[1]
    rates = [0.004] * columns
    for position in outlier_order(permuted)[: round(columns * 0.1)]:
        rates[position] = 0.014
    looked_up = []
    for start in range(0, columns, 128):
        for inside in range(min(128, columns - start)):
            looked_up.append(rates[inside])
    return looked_up


def kept_rows(column: np.ndarray, rate: float) -> list[int]:
    """Rows outside the strict inside of the falling order, for columns without equal values."""
    rows = len(column)
    falling = sorted(range(rows), key=lambda row: -column[row])
    first, last = round(rows * rate), round(rows * (1 - rate))
    return sorted(row for rank, row in enumerate(falling) if rank <= first or rank >= last)


def heavy_tailed(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of which some reach 13 times the mean, and a Hessian."""
    weight, hessian = random_problem(rows, columns, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weight = weight * torch.exp(0.9 * torch.randn(rows, columns, generator=generator))
    spread = torch.randperm(columns, generator=generator) / columns
    return weight * (0.5 + spread), hessian


def statistics_of(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[ColumnStatistics, list]:
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    prices = torch.ones(weight.shape[1])
    return ColumnStatistics(weight, prices, torch.from_numpy(order.copy())), order.tolist()


SHAPES = [(1, 3), (60, 40), (124, 31), (200, 127), (300, 128), (375, 300), (64, 500)]


@pytest.mark.parametrize("target", [2, 2.05, 2.1, 2.2, 2.5, 2.99, 3, 3.05, 3.1, 3.5, 4])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bits_are_those_of_the_reference(rows, columns, target):
    weight, hessian = heavy_tailed(rows, columns, seed=rows)
    statistics, order = statistics_of(weight, hessian)
    expected = bits_of_positions(weight.double().numpy()[:, order], target)
    assert Precision(target).plan(statistics)[order].tolist() == expected


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_kept_counts_are_those_of_the_reference(rows, columns):
    weight, hessian = heavy_tailed(rows, columns, seed=rows)
    statistics, order = statistics_of(weight, hessian)
    permuted = weight.double().numpy()[:, order]
    rates = rates_of_positions(permuted)
    expected = [len(kept_rows(permuted[:, j], rates[j])) for j in range(columns)]
    assert Reservation().plan(statistics)[order].tolist() == expected


def test_the_cases_have_outliers_and_ties_and_an_index_error_that_shows():
    weight, hessian = heavy_tailed(375, 300, seed=375)
    statistics, _ = statistics_of(weight, hessian)
    counts = statistics.outlier_counts(13.0)
    assert len(counts.unique()) > 2
    assert int((counts == counts.mode().values).sum()) > 30
    shipped, meant = Reservation().plan(statistics), Reservation(block=0).plan(statistics)
    assert not torch.equal(shipped, meant)
    top = torch.topk(counts, 5).indices
    assert set(meant[top].tolist()) == {int(meant.max())}
    assert int((meant == meant.max()).sum()) == 30


@pytest.mark.parametrize(
    ("rows", "low", "high"), [(4096, 33, 115), (11008, 89, 309), (100, 1, 3), (30, 1, 1), (1, 1, 1)]
)
def test_kept_counts_of_common_heights(rows, low, high):
    weight = torch.zeros(rows, 20)
    counts = Reservation().plan(ColumnStatistics(weight, torch.ones(20), torch.arange(20)))
    assert counts.tolist() == [high] * 2 + [low] * 18


def test_a_plan_before_the_weights_are_read_is_the_upper_end():
    assert planned_layout(recipe(reservation=Reservation()), 4096, 4096).reserved == 4096 * 115


def reference_rule(bits: list[int], rates: list[float], rounded: bool):
    """Quantize the columns in turn: k-means on all entries, tails in float16.

    rounded: entries go to the nearest centroid as it is stored; else to that of the fit, as the
        reference code does it.
    """
    positions = iter(range(len(bits)))

    def quantize(_column: int, values: np.ndarray) -> np.ndarray:
        position = next(positions)
        single = values.astype(np.float32)
        means = ReferenceKMeans(n_clusters=2 ** bits[position], random_state=10, n_init=1)
        centroids = np.sort(means.fit(single.reshape(-1, 1)).cluster_centers_.reshape(-1))
        stored = centroids.astype(np.float16).astype(np.float64)
        compared = stored if rounded else centroids.astype(np.float64)
        distances = np.abs(single.astype(np.float64)[:, None] - compared)
        quantized = stored[distances.argmin(axis=1)]
        for row in kept_rows(single, rates[position]):
            quantized[row] = np.float16(single[row])
        return quantized

    return quantize


def reference_problem(rows: int, columns: int):
    """Return weights, Hessian, visiting order, and the reference's bits and rates in that order."""
    weight, hessian = heavy_tailed(rows, columns, seed=4)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable").tolist()
    permuted = weight.double().numpy()[:, order]
    return weight, hessian, order, bits_of_positions(permuted, 2.2), rates_of_positions(permuted)


@pytest.fixture(scope="module")
def single_core() -> Iterator[None]:
    """scikit-learn starts all its threads for every column, which take longer than the fits."""
    with threadpool_limits(1):
        yield


@pytest.mark.usefixtures("single_core")
@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(80, 130, 128), (150, 20, 128), (150, 20, 7)]
)
def test_whole_matrices_are_those_of_the_reference(rows, columns, block):
    weight, hessian, order, bits, rates = reference_problem(rows, columns)
    rule = reference_rule(bits, rates, rounded=True)
    expected, compensated = explicit_obs(weight, damped(hessian, 0.01), order, rule)
    chosen = recipe(
        codebook=Led(SklearnKMeans(), compensated),
        precision=Precision(2.2),
        reservation=Reservation(),
        solver=Gptq(act_order=True, block_size=block, damping=0.01),
    )
    result = solve(weight, hessian, chosen).quantized
    assert result.column_bits[order].tolist() == bits
    assert np.array_equal(result.dequantize().numpy(), expected)


@pytest.mark.usefixtures("single_core")
def test_entries_beyond_the_rounding_of_a_border_have_the_level_of_unrounded_centroids():
    weight, hessian, order, bits, rates = reference_problem(150, 20)
    rule = reference_rule(bits, rates, rounded=False)
    expected, compensated = explicit_obs(weight, damped(hessian, 0.01), order, rule)
    chosen = recipe(
        codebook=Led(SklearnKMeans(), compensated),
        precision=Precision(2.2),
        reservation=Reservation(),
    )
    result = solve(weight, hessian, chosen).quantized.dequantize().double().numpy()
    # a border is half the sum of two centroids, each of which rounding to float16 moves this much
    moved = 2**-11 * np.maximum(np.abs(result), np.abs(expected))
    near = np.abs(compensated - (result + expected) / 2) <= 4 * moved
    assert np.array_equal(result[~near], expected[~near])
    assert np.mean(result == expected) > 0.99


@pytest.mark.parametrize("bad", [1.9, 4.5, float("nan")])
def test_targets_beyond_the_reach_of_the_pairs_are_refused(bad):
    with pytest.raises(ConfigError, match=r"precision\.target_bits"):
        Precision(bad)


def test_a_negative_block_is_refused():
    with pytest.raises(ConfigError, match=r"reservation\.block"):
        Reservation(block=-1)
