"""Adaptive precision: the budget is a ceiling, and the columns with most outliers come first."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import random_problem, recipe, solve

from claq_exp.errors import ConfigError
from claq_exp.quantize.precision import Fixed, OutlierOrder
from claq_exp.quantize.statistics import ColumnStatistics

QUICK = settings(max_examples=100, deadline=None, derandomize=True)


def statistics_of(weight: torch.Tensor, distortion: torch.Tensor | None = None) -> ColumnStatistics:
    given_weight = torch.ones(weight.shape[1]) if distortion is None else distortion
    return ColumnStatistics(weight, given_weight)


def with_outlier_counts(counts: list[int], rows: int = 40) -> torch.Tensor:
    """Weights of size about one, with so many entries of 1000 in each column."""
    weight = torch.randn(rows, len(counts), generator=torch.manual_seed(0)).clamp(-3, 3)
    for column, count in enumerate(counts):
        weight[:count, column] = 1000.0 * (-1) ** column
    return weight


@QUICK
@given(st.floats(2, 4), st.integers(1, 200), st.integers(0, 100))
def test_mean_bits_never_exceed_the_target_and_fall_short_by_less_than_one_column(
    target, columns, seed
):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    strategy = OutlierOrder(target_bits=target)
    bits = strategy.plan(statistics_of(weight))
    low, high = (2, 4) if target < 3 else (3, 4)
    assert bits.dtype == torch.uint8
    assert bits.shape == (columns,)
    assert set(bits.tolist()) <= {low, high}
    mean = bits.double().mean().item()
    assert mean <= target + 1e-8
    assert mean > target - (high - low) / columns


@QUICK
@given(st.data(), st.integers(1, 7), st.integers(1, 60))
def test_custom_widths_keep_the_budget_too(data, low, columns):
    high = data.draw(st.integers(low + 1, 8))
    target = data.draw(st.floats(low, high))
    strategy = OutlierOrder(target_bits=target, low_bits=low, high_bits=high)
    bits = strategy.plan(statistics_of(torch.ones(2, columns)))
    assert set(bits.tolist()) <= {low, high}
    assert target - (high - low) / columns < bits.double().mean().item() <= target + 1e-8


@pytest.mark.parametrize(
    ("target", "columns", "high"),
    [(2.0, 50, 0), (2.1, 20, 1), (2.2, 40, 4), (2.9, 20, 9), (3.0, 10, 0), (3.1, 10, 1), (4, 7, 7)],
)
def test_a_target_that_the_columns_can_meet_is_met_exactly(target, columns, high):
    bits = OutlierOrder(target_bits=target).plan(statistics_of(torch.ones(2, columns)))
    assert int((bits == 4).sum()) == high
    assert bits.double().mean().item() == pytest.approx(target, abs=1e-12)


def test_columns_with_most_outliers_get_the_higher_width():
    weight = with_outlier_counts([0, 3, 1, 0, 5, 2, 0, 0, 4, 0])
    for target, expected in [(2.2, {4}), (2.6, {4, 8, 1}), (3.4, {4, 8, 1, 5})]:
        bits = OutlierOrder(target_bits=target).plan(statistics_of(weight))
        assert set(torch.nonzero(bits == 4).flatten().tolist()) == expected


def test_an_outlier_reaches_the_threshold_times_the_matrix_mean():
    weight = torch.ones(10, 10)
    weight[0, 3] = 16.0  # the mean of |W| becomes 1.15
    statistics = statistics_of(weight)
    assert statistics.outlier_counts(13.0).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert statistics.outlier_counts(14.0).sum() == 0
    assert statistics_of(-weight).outlier_counts(13.0)[3] == 1


def test_ties_go_to_the_larger_saliency_and_then_to_the_lower_index():
    weight = torch.ones(4, 6)
    distortion = torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0, 0.5])
    order = statistics_of(weight, distortion).outlier_order(13.0)
    assert order.tolist() == [1, 3, 2, 0, 4, 5]


@QUICK
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=30))
def test_the_outlier_order_is_a_stable_sort_by_count_and_saliency(columns):
    counts = [count for count, _ in columns]
    weight = with_outlier_counts(counts, rows=200)
    distortion = torch.tensor([float(price) for _, price in columns])
    statistics = statistics_of(weight, distortion)
    found = statistics.outlier_counts(2.0).tolist()
    saliency = statistics.sensitivity().tolist()
    expected = sorted(range(len(columns)), key=lambda j: (-found[j], -saliency[j], j))
    assert statistics.outlier_order(2.0).tolist() == expected


def test_saliency_is_the_mean_square_times_the_price_of_an_error():
    weight, _ = random_problem(rows=5, columns=4, seed=0)
    distortion = torch.tensor([1.0, 10.0, 0.0, 2.0])
    expected = (weight.numpy().astype(np.float64) ** 2).mean(axis=0) * distortion.numpy()
    assert statistics_of(weight, distortion).sensitivity().numpy() == pytest.approx(expected)


def test_under_gptq_equal_counts_are_ordered_by_the_price_that_the_solver_states():
    weight, hessian = random_problem(rows=30, columns=20, seed=3)
    chosen = recipe(precision=OutlierOrder(2.5))
    system = chosen.solver.prepare(hessian)
    saliency = weight.square().mean(dim=0) * system.distortion_weight
    quantized = solve(weight, hessian, chosen).quantized
    high = torch.nonzero(quantized.column_bits == 4).flatten().tolist()
    assert statistics_of(weight).outlier_counts(13.0).sum() == 0
    assert set(high) == set(torch.argsort(saliency, descending=True)[:5].tolist())
    assert quantized.layout().nominal_bits() == 2.5


@pytest.mark.parametrize(
    "options",
    [
        {"target_bits": 1.9},
        {"target_bits": 4.1},
        {"target_bits": math.nan},
        {"target_bits": 2.5, "low_bits": 3, "high_bits": 4},
        {"target_bits": 5.0, "low_bits": 2, "high_bits": 4},
        {"target_bits": 3.0, "low_bits": 3, "high_bits": 3},
        {"target_bits": 3.0, "low_bits": 4, "high_bits": 2},
        {"target_bits": 3.0, "low_bits": 0, "high_bits": 4},
        {"target_bits": 3.0, "low_bits": 2, "high_bits": 9},
        {"target_bits": 3.0, "low_bits": 2},
        {"target_bits": 3.0, "high_bits": 4},
        {"threshold": 0.0},
        {"threshold": math.nan},
    ],
    ids=str,
)
def test_impossible_targets_and_widths_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=r"precision\.(target_bits|low_bits|threshold)"):
        OutlierOrder(**options)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_a_fixed_width_that_no_code_can_have_is_refused(bits):
    with pytest.raises(ConfigError, match=r"precision\.bits"):
        Fixed(bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_fixed_width_is_every_columns_width(bits):
    assert Fixed(bits).plan(statistics_of(torch.ones(3, 5))).tolist() == [bits] * 5
