"""Outlier reservation: how many entries of which column stay in float16, and which ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import fitted, random_problem, recipe, solve

from claq_exp.errors import ConfigError
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.reservation import (
    Fixed,
    Hessian,
    NoReservation,
    OutlierOrder,
    Random,
    Reservation,
)
from claq_exp.quantize.reservation.shares import counts_from_shares
from claq_exp.quantize.solver import Gptq, Nearest
from claq_exp.quantize.statistics import ColumnStatistics

QUICK = settings(max_examples=100)
ratios = st.one_of(st.sampled_from([0.0, 1e-9, 0.005, 0.5, 1.0]), st.floats(0, 1))


def flat_statistics(rows: int, columns: int) -> ColumnStatistics:
    """Equal columns, so that the outlier order is the order of the indices."""
    return ColumnStatistics(torch.ones(rows, columns), torch.ones(columns), torch.arange(columns))


@pytest.mark.case(43)
@pytest.mark.parametrize("strategy", [Fixed, OutlierOrder, Hessian, Random])
@QUICK
@given(ratio=ratios, rows=st.integers(1, 60), columns=st.integers(1, 60))
def test_the_ratio_is_realised_to_the_entry_and_no_column_overflows(strategy, ratio, rows, columns):
    counts = strategy(ratio=ratio).plan(flat_statistics(rows, columns))
    assert counts.dtype == torch.int64
    assert counts.shape == (columns,)
    assert int(counts.sum()) == round(ratio * rows * columns)
    assert int(counts.min()) >= 0
    assert int(counts.max()) <= rows


@QUICK
@given(ratio=ratios, rows=st.integers(1, 60), columns=st.integers(1, 60))
def test_fixed_counts_differ_by_one_at_most(ratio, rows, columns):
    counts = Fixed(ratio).plan(flat_statistics(rows, columns))
    assert int(counts.max() - counts.min()) <= 1


def test_no_reservation_keeps_nothing():
    assert NoReservation().plan(flat_statistics(4, 3)).tolist() == [0, 0, 0]


def test_sensitive_columns_keep_boost_times_the_share_of_the_others():
    counts = OutlierOrder(ratio=0.01).plan(flat_statistics(4000, 50))
    # 8 and 28 of 1000 entries are CLAQ's 0.4 % and 1.4 % a side
    assert counts[:5].tolist() == [112] * 5
    assert counts[5:].tolist() == [32] * 45


def test_the_columns_with_most_outliers_are_the_sensitive_ones():
    weight, _ = random_problem(rows=400, columns=10, seed=0)
    weight[:3, 6] = 1000.0
    weight[:2, 1] = -1000.0
    statistics = ColumnStatistics(weight, torch.ones(10), torch.arange(10))
    counts = OutlierOrder(ratio=0.05, top_columns=0.2, boost=4.0).plan(statistics)
    assert set(torch.topk(counts, 2).indices.tolist()) == {1, 6}
    assert counts[6].item() == pytest.approx(4 * counts[0].item(), abs=4)


@QUICK
@given(
    st.integers(1, 120),
    st.integers(0, 500),
    st.sampled_from([0.0, 0.1, 0.25, 1.0]),
    st.floats(1, 6),
)
def test_every_column_keeps_its_share_to_within_one_entry(columns, total, top_columns, boost):
    shares = torch.ones(columns, dtype=torch.float64)
    shares[: math.floor(top_columns * columns + 0.5)] = boost
    exact = total * shares / shares.sum()
    counts = counts_from_shares(shares, total, limit=1000)
    assert int(counts.sum()) == total
    assert (counts - exact).abs().max() < 1 + 1e-9


def test_a_small_ratio_does_not_pile_up_in_the_sensitive_columns():
    counts = OutlierOrder(ratio=0.01).plan(flat_statistics(50, 100))
    # 0.4 entries for an ordinary column, 1.4 for a sensitive one
    assert int(counts.sum()) == 50
    assert int(counts[:10].max()) <= 2
    assert int(counts[10:].sum()) >= 30


@QUICK
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers(0, 12), st.floats(0, 1))
def test_counts_fill_any_shares_up_to_the_limit(shares, limit, part):
    total = math.floor(part * limit * len(shares))
    counts = counts_from_shares(torch.tensor(shares, dtype=torch.float64), total, limit)
    assert int(counts.sum()) == total
    assert int(counts.min()) >= 0
    assert int(counts.max()) <= limit


def test_what_does_not_fit_a_full_column_goes_to_the_others():
    shares = torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64)
    assert counts_from_shares(shares, 12, limit=4).tolist() == [4, 4, 4]
    assert counts_from_shares(shares, 8, limit=4).tolist() == [4, 2, 2]


def test_equal_remainders_go_to_the_lower_columns():
    assert counts_from_shares(torch.ones(5).double(), 7, limit=9).tolist() == [2, 2, 1, 1, 1]


def test_more_entries_than_the_matrix_has_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        counts_from_shares(torch.ones(2).double(), 7, limit=3)


@pytest.mark.case(43)
@pytest.mark.parametrize("strategy", [Fixed, OutlierOrder, Hessian, Random])
@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_an_impossible_ratio_is_refused_by_name(strategy, ratio):
    with pytest.raises(ConfigError, match=r"reservation\.ratio"):
        strategy(ratio=ratio)


@pytest.mark.parametrize(
    "options",
    [
        {"top_columns": -0.1},
        {"top_columns": 2.0},
        {"boost": 0.5},
        {"boost": math.nan},
        {"threshold": 0.0},
        {"ties": "index"},
        {"ratio_of": "one_tail"},
        {"select": "middle"},
    ],
    ids=str,
)
def test_other_impossible_options_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=rf"reservation\.{next(iter(options))}"):
        OutlierOrder(**options)


@pytest.mark.parametrize(("select", "kept"), [("magnitude", [0, 1, 2]), ("tails", [1, 2, 4])])
def test_a_rule_says_which_entries_of_a_column_stay(select, kept):
    weight = torch.tensor([[7.0], [9.0], [8.0], [1.0], [-2.0], [0.5]])
    chosen = recipe(reservation=Fixed(0.5, select=select), solver=Nearest())
    result = solve(weight, torch.eye(1, dtype=torch.float64), chosen).quantized
    assert result.reserved.rows.tolist() == kept


@dataclass(frozen=True)
class OfOnesOwn(Reservation):
    """A reservation that says nothing of `select`, or one that does not exist."""

    def plan(self, statistics):
        return torch.full((statistics.shape[1],), 2)


def test_a_rule_of_ones_own_without_a_choice_keeps_the_largest_magnitudes():
    weight = torch.tensor([[7.0], [9.0], [8.0], [1.0], [-2.0], [0.5]])
    chosen = recipe(reservation=OfOnesOwn(), solver=Nearest())
    result = solve(weight, torch.eye(1, dtype=torch.float64), chosen).quantized
    assert result.reserved.rows.tolist() == [1, 2]


def test_a_rule_of_ones_own_with_an_unknown_choice_is_refused():
    class Middle(OfOnesOwn):
        select = "middle"

    with pytest.raises(ConfigError, match=r"select 'middle'.*magnitude, tails"):
        recipe(reservation=Middle())


@pytest.mark.parametrize("strategy", [Fixed, OutlierOrder, Hessian, Random])
@QUICK
@given(ratio=st.floats(0, 0.5), rows=st.integers(1, 60), columns=st.integers(1, 60))
def test_a_ratio_of_each_tail_keeps_twice_as_many(strategy, ratio, rows, columns):
    counts = strategy(ratio=ratio, ratio_of="each_tail").plan(flat_statistics(rows, columns))
    assert int(counts.sum()) == round(2 * ratio * rows * columns)


def test_the_reference_rates_are_a_ratio_of_half_a_percent_of_each_tail():
    counts = OutlierOrder(0.005, ratio_of="each_tail").plan(flat_statistics(4000, 50))
    assert counts.tolist() == [112] * 5 + [32] * 45  # 1.4 % and 0.4 % a side


def test_a_ratio_of_each_tail_beyond_a_half_is_refused():
    with pytest.raises(ConfigError, match=r"reservation\.ratio is 0.6; .* from 0 to 0.5"):
        Fixed(0.6, ratio_of="each_tail")


def test_sensitive_columns_are_those_of_largest_saliency_or_of_the_draw():
    weight, _ = random_problem(rows=400, columns=10, seed=0)
    prices = torch.tensor([1.0, 1.0, 50.0, 1.0, 1.0, 1.0, 1.0, 90.0, 1.0, 1.0])
    statistics = ColumnStatistics(weight, prices, torch.arange(10))
    options = {"ratio": 0.05, "top_columns": 0.2, "boost": 4.0}
    counts = Hessian(**options).plan(statistics)
    assert set(torch.topk(counts, 2).indices.tolist()) == {2, 7}
    counts = Random(**options, seed=3).plan(statistics)
    drawn = statistics.random_order(3)[:2].tolist()
    assert set(torch.topk(counts, 2).indices.tolist()) == set(drawn)
    first = OutlierOrder(**options, ties="visiting")
    backwards = ColumnStatistics(weight, prices, torch.arange(9, -1, -1))
    assert set(torch.topk(first.plan(backwards), 2).indices.tolist()) == {8, 9}


def test_kept_entries_are_the_weights_in_float16_and_the_codebook_fits_the_others():
    weight, hessian = random_problem(rows=50, columns=6, seed=1)
    weight[7, 2] = 40.0
    chosen = recipe(reservation=Fixed(ratio=4 / 50), solver=Nearest())
    result = solve(weight, hessian, chosen).quantized
    dense = result.dequantize()
    for column in range(6):
        values = weight[:, column]
        kept = torch.argsort(-values.abs(), stable=True)[:4].sort().values
        mine = result.reserved.columns() == column
        assert torch.equal(result.reserved.rows[mine], kept)
        assert torch.equal(result.reserved.values[mine], values[kept].half())
        assert torch.equal(dense[kept, column], values[kept].half().float())
        weights = np.ones(50, dtype=np.float32)
        weights[kept] = 0
        levels = fitted(fit_levels, values.numpy(), 8, weights).astype(np.float16)
        assert result.values[column].numpy().tolist() == levels.tolist()
        assert not result.codes[kept, column].any()


@pytest.mark.parametrize("solver", [Gptq(), Nearest()])
def test_keeping_everything_costs_nothing_but_float16_rounding(solver):
    weight, hessian = random_problem(rows=9, columns=5, seed=2)
    solved = solve(weight, hessian, recipe(reservation=Fixed(1.0), solver=solver))
    assert solved.weight_error < 1e-6
    if isinstance(solver, Nearest):
        assert torch.equal(solved.quantized.dequantize(), weight.half().float())


def test_keeping_outliers_lowers_the_output_error():
    errors = {0.0: [], 0.02: []}
    for seed in range(5):
        weight, hessian = random_problem(rows=100, columns=16, seed=seed)
        weight[torch.arange(8), torch.arange(8)] = 30.0
        for ratio, found in errors.items():
            found.append(solve(weight, hessian, recipe(reservation=Fixed(ratio))).output_error)
    assert np.mean(errors[0.02]) < 0.8 * np.mean(errors[0.0])
