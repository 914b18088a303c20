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
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed, Hessian, LayerMap, Magnitude, OutlierOrder, Random
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import planned_layout, quantize_weight
from claq_exp.quantize.statistics import ColumnStatistics

QUICK = settings(max_examples=100)


def statistics_of(weight: torch.Tensor, distortion: torch.Tensor | None = None) -> ColumnStatistics:
    given_weight = torch.ones(weight.shape[1]) if distortion is None else distortion
    return ColumnStatistics(weight, given_weight, torch.arange(weight.shape[1]))


def with_outlier_counts(counts: list[int], rows: int = 40) -> torch.Tensor:
    """Weights of size about one, with so many entries of 1000 in each column."""
    weight = torch.randn(rows, len(counts), generator=torch.manual_seed(0)).clamp(-3, 3)
    for column, count in enumerate(counts):
        weight[:count, column] = 1000.0 * (-1) ** column
    return weight


two_widths = pytest.mark.parametrize("rule", [OutlierOrder, Hessian, Magnitude, Random])


@pytest.mark.case(42)
@two_widths
@QUICK
@given(target=st.floats(2, 4), columns=st.integers(1, 200), seed=st.integers(0, 100))
def test_mean_bits_never_exceed_the_target_and_fall_short_by_less_than_one_column(
    rule, target, columns, seed
):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    strategy = rule(target_bits=target)
    bits = strategy.plan(statistics_of(weight))
    low, high = (2, 4) if target < 3 else (3, 4)
    assert bits.dtype == torch.uint8
    assert bits.shape == (columns,)
    assert set(bits.tolist()) <= {low, high}
    mean = bits.double().mean().item()
    assert mean <= target + 1e-8
    assert mean > target - (high - low) / columns


@two_widths
@QUICK
@given(data=st.data(), low=st.integers(1, 7), columns=st.integers(1, 60))
def test_custom_widths_keep_the_budget_too(rule, data, low, columns):
    high = data.draw(st.integers(low + 1, 8))
    target = data.draw(st.floats(low, high))
    strategy = rule(target_bits=target, low_bits=low, high_bits=high)
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


@pytest.mark.case(46)
@pytest.mark.parametrize("rule", [OutlierOrder, Hessian, Magnitude])
def test_one_extreme_column_gets_the_higher_width_and_equal_ones_go_by_their_index(rule):
    precision = rule(target_bits=2.25)
    equal = precision.plan(statistics_of(torch.ones(40, 8)))
    assert equal.tolist() == [4, 2, 2, 2, 2, 2, 2, 2]
    weight = torch.ones(40, 8)
    weight[:3, 5] = 1000.0
    assert precision.plan(statistics_of(weight)).tolist() == [2, 2, 2, 2, 2, 4, 2, 2]


def test_an_outlier_reaches_the_threshold_times_the_matrix_mean():
    weight = torch.ones(10, 10)
    weight[0, 3] = 16.0  # the mean of |W| becomes 1.15
    statistics = statistics_of(weight)
    assert statistics.outlier_counts(13.0).tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert statistics.outlier_counts(14.0).sum() == 0
    assert statistics_of(-weight).outlier_counts(13.0)[3] == 1


@pytest.mark.case(30)
def test_ties_go_to_the_larger_saliency_and_then_to_the_lower_index():
    weight = torch.ones(4, 6)
    distortion = torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0, 0.5])
    order = statistics_of(weight, distortion).outlier_order(13.0)
    assert order.tolist() == [1, 3, 2, 0, 4, 5]


@pytest.mark.case(30)
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
    system = chosen.solver.prepare(Moments(hessian))
    saliency = weight.square().mean(dim=0) * system.distortion_weight
    quantized = solve(weight, hessian, chosen).quantized
    high = torch.nonzero(quantized.column_bits == 4).flatten().tolist()
    assert statistics_of(weight).outlier_counts(13.0).sum() == 0
    ordered = saliency.sort(descending=True)
    assert ordered.values[4] > 1.001 * ordered.values[5]  # no rounding decides
    assert set(high) == set(ordered.indices[:5].tolist())
    assert quantized.layout().nominal_bits() == 2.5


def visited(weight: torch.Tensor, order: list[int], name: str = "") -> ColumnStatistics:
    prices = torch.ones(weight.shape[1])
    return ColumnStatistics(weight, prices, torch.tensor(order), name)


def test_ties_may_go_to_the_column_that_is_visited_first():
    statistics = visited(with_outlier_counts([0, 2, 0, 2, 1, 0]), [5, 3, 0, 1, 2, 4])
    assert statistics.outlier_order(5.0, ties="visiting").tolist() == [3, 1, 4, 5, 0, 2]
    bits = OutlierOrder(3.5, threshold=5.0, ties="visiting").plan(statistics)
    assert bits.tolist() == [3, 4, 3, 4, 4, 3]


@QUICK
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30).flatmap(
        lambda counts: st.tuples(st.just(counts), st.permutations(range(len(counts))))
    )
)
def test_visiting_ties_are_a_stable_sort_of_the_visited_columns(case):
    counts, order = case
    statistics = visited(with_outlier_counts(counts, rows=200), order)
    found = statistics.outlier_counts(2.0).tolist()
    expected = sorted(order, key=lambda column: -found[column])
    assert statistics.outlier_order(2.0, ties="visiting").tolist() == expected


def test_hessian_gives_the_higher_width_to_the_columns_of_largest_saliency():
    weight, hessian = random_problem(rows=30, columns=20, seed=4)
    order = sorted(range(20), key=lambda j: -hessian[j, j].item())
    matrix = hessian.numpy() + 0.01 * hessian.numpy().diagonal().mean() * np.eye(20)
    saliency = {}
    for position, column in enumerate(order):  # U_jj^2 is the first of the inverse of what is left
        left = order[position:]
        price = 1 / np.linalg.inv(matrix[np.ix_(left, left)])[0, 0]
        saliency[column] = np.mean(weight.double().numpy()[:, column] ** 2) * price
    bits = solve(weight, hessian, recipe(precision=Hessian(2.5))).quantized.column_bits
    falling = sorted(saliency, key=saliency.__getitem__, reverse=True)
    assert saliency[falling[4]] > 1.001 * saliency[falling[5]]  # no rounding decides
    assert torch.nonzero(bits == 4).flatten().tolist() == sorted(falling[:5])


def test_magnitude_gives_the_higher_width_to_the_columns_of_largest_mean_size():
    weight = torch.tensor([[1.0, -3.0, 0.0, 2.0, 1.0], [1.0, -3.0, 5.0, 2.0, -1.0]])
    prices = torch.tensor([9.0, 1.0, 1.0, 1.0, 9.0])
    assert Magnitude(3.2).plan(statistics_of(weight, prices)).tolist() == [3, 4, 3, 3, 3]
    assert Magnitude(3.4).plan(statistics_of(weight, prices)).tolist() == [3, 4, 4, 3, 3]
    assert Magnitude(3.8).plan(statistics_of(weight, prices)).tolist() == [4, 4, 4, 4, 3]


def test_a_random_draw_follows_from_seed_name_and_shape_alone():
    def draw(seed: int = 0, name: str = "a", rows: int = 4, columns: int = 50) -> list[int]:
        weight = torch.randn(rows, columns)
        return visited(weight, list(range(columns)), name).random_order(seed).tolist()

    np.random.seed(1)
    torch.manual_seed(1)
    first = draw()
    np.random.seed(2)
    state = np.random.get_state()[1].tolist()
    assert draw() == first
    assert np.random.get_state()[1].tolist() == state
    assert sorted(first) == list(range(50))
    others = [draw(seed=1), draw(name="b"), draw(rows=5), draw(columns=51)]
    assert len({tuple(order) for order in [first, *others]}) == 5
    assert draw(columns=8) == PINNED


PINNED = [1, 3, 5, 2, 4, 0, 6, 7]  # must never change, or finished runs could not be repeated


def test_every_column_is_drawn_about_equally_often():
    drawn = torch.zeros(20)
    for seed in range(400):
        drawn += Random(2.5, seed=seed).plan(statistics_of(torch.ones(2, 20))) == 4
    assert drawn.sum() == 400 * 5
    assert 60 < drawn.min() <= drawn.max() < 140  # 100 expected, standard deviation 8.7


NAME = "model.layers.10.self_attn.k_proj"


@pytest.mark.parametrize(
    ("widths", "bits"),
    [
        ({}, 4),
        ({NAME: 2}, 2),
        ({"k_proj": 2}, 2),
        ({"10.self_attn.k_proj": 2}, 2),
        ({".10.self_attn.k_proj": 2}, 2),
        ({"0.self_attn.k_proj": 2, "proj": 2, "model": 2, "K_PROJ": 2}, 4),
        ({"layers.10.*": 2}, 2),
        ({"layers.1.*": 2}, 4),
        ({"layers.1?.*": 2}, 2),
        ({"*.[kv]_proj": 2}, 2),
        ({"*": 3, "k_proj": 2}, 3),
        ({"k_proj": 2, "*": 3}, 2),
    ],
    ids=str,
)
def test_a_layer_map_gives_a_layer_the_width_of_the_first_entry_that_names_it(widths, bits):
    chosen = LayerMap(widths=widths)
    statistics = visited(torch.ones(2, 3), [0, 1, 2], NAME)
    assert chosen.plan(statistics).tolist() == [bits] * 3
    assert chosen.plan_key(NAME) == bits


def test_a_layer_map_reaches_a_layer_by_the_name_of_its_problem():
    weight, hessian = random_problem(rows=6, columns=5, seed=0)
    chosen = recipe(precision=LayerMap({"down_proj": 2}, default=5))
    system = chosen.solver.prepare(Moments(hessian))
    for name, bits in {"layers.0.mlp.down_proj": 2, "layers.0.mlp.up_proj": 5, "": 5}.items():
        solved = quantize_weight(LinearProblem(weight, hessian, name), system, chosen)
        assert solved.quantized.layout().columns_per_width == {bits: 5}
        assert solved.quantized.layout() == planned_layout(chosen, 6, 5, name)


@pytest.mark.parametrize("options", [{"widths": {"a": 0}}, {"widths": {"a": 9}}, {"default": 0}])
def test_a_layer_map_with_a_width_that_no_code_can_have_is_refused(options):
    with pytest.raises(ConfigError, match=r"precision\.(widths\.a|default) is \d"):
        LayerMap(**options)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match=r"precision\.seed"):
        Random(seed=-1)


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
        {"ties": "index"},
    ],
    ids=str,
)
def test_impossible_targets_and_widths_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=r"precision\.(target_bits|low_bits|threshold|ties)"):
        OutlierOrder(**options)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_a_fixed_width_that_no_code_can_have_is_refused(bits):
    with pytest.raises(ConfigError, match=r"precision\.bits"):
        Fixed(bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_fixed_width_is_every_columns_width(bits):
    assert Fixed(bits).plan(statistics_of(torch.ones(3, 5))).tolist() == [bits] * 5
