"""Spending a budget of bits: against every assignment there is, and against the paper's rules."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import recipe

from claq_exp.allocate import NoAllocation, RateDistortion
from claq_exp.allocate.choices import (
    Choices,
    allocate,
    choose_variants,
    column_options,
    measure_choices,
    measure_tables,
)
from claq_exp.errors import ConfigError
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook import GroupTableCodebook, KMeans, Quantile
from claq_exp.quantize.precision import NoPrecision, OutlierOrder
from claq_exp.quantize.reservation import Fixed as FixedShare
from claq_exp.quantize.statistics import ColumnStatistics

QUICK = settings(max_examples=60)
FORMS = st.one_of(
    st.builds(KMeans, shared=st.booleans(), row_scales=st.booleans()),
    st.builds(KMeans, snap=st.sampled_from(["apot", "grid"]), snap_bits=st.sampled_from([7, 8])),
)


def random_choices(
    seed: int,
    columns: int,
    rows: int = 64,
    widths: tuple[int, ...] = (1, 2, 3, 4),
    shares: tuple[float, ...] = (),
    **changes: object,
) -> Choices:
    """A made-up matrix: distortion falls by about four with a bit, and a bit with reservation."""
    generator = np.random.default_rng(seed)
    options = column_options(rows, widths, shares)
    fall = generator.uniform(2.5, 5, size=(columns, 1)) ** -options[:, 0]
    fall = fall * generator.uniform(0.3, 1, size=(columns, 1)) ** (options[:, 1] / rows * 20)
    distortion = generator.lognormal(sigma=2, size=(columns, 1)) * fall
    given_choices = {"codebook": KMeans(), "nominal": True, **changes}
    return Choices(rows, options, distortion, **given_choices)


def chosen_options(choices: Choices, plan) -> np.ndarray:
    pairs = zip(plan.column_bits.tolist(), plan.reserved_counts.tolist(), strict=True)
    known = [tuple(option) for option in choices.options.tolist()]
    return np.array([known.index(pair) for pair in pairs])


def outcome(matrices: list[Choices], plans) -> tuple[float, float]:
    """(bits, distortion) of plans."""
    bits = distortion = 0.0
    for matrix, plan in zip(matrices, plans, strict=True):
        chosen = chosen_options(matrix, plan)
        bits += matrix.bits(chosen)
        distortion += matrix.distortion[np.arange(matrix.columns), chosen].sum()
    return bits, distortion


def weights_of(matrices: list[Choices]) -> int:
    return sum(matrix.rows * matrix.columns for matrix in matrices)


def best_of_all(matrix: Choices, budget: float) -> float:
    """The least distortion of any assignment within the budget."""
    best = np.inf
    every = np.arange(matrix.columns)
    for assignment in product(range(len(matrix.options)), repeat=matrix.columns):
        chosen = np.array(assignment)
        distortion = matrix.distortion[every, chosen].sum()
        if distortion < best and matrix.bits(chosen) <= budget:
            best = distortion
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("per_weight", [1.0, 1.4, 1.99, 2.5, 3.3, 4.0])
def test_the_allocation_is_within_one_columns_step_of_the_best_of_all(seed, per_weight):
    matrix = random_choices(seed, columns=5)
    budget = per_weight * weights_of([matrix])
    plans = allocate([matrix], budget)
    bits, found = outcome([matrix], plans)
    best = best_of_all(matrix, budget)
    assert bits <= budget
    chosen = chosen_options(matrix, plans[0])
    dearer = np.minimum(chosen + 1, len(matrix.options) - 1)
    every = np.arange(5)
    steps = matrix.distortion[every, chosen] - matrix.distortion[every, dearer]
    assert best - 1e-12 <= found <= best + steps.max() + 1e-12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_weight", [1.6, 2.4, 3.0])
def test_no_exchange_of_single_steps_improves_a_convex_allocation(seed, per_weight):
    matrix = random_choices(seed, columns=30)
    budget = per_weight * weights_of([matrix])  # whole steps of 64 bits: nothing is left over
    plans = allocate([matrix], budget)
    chosen = chosen_options(matrix, plans[0])
    table = matrix.distortion
    gains = [table[j, at] - table[j, at + 1] for j, at in enumerate(chosen) if at < 3]
    losses = [table[j, at - 1] - table[j, at] for j, at in enumerate(chosen) if at > 0]
    assert outcome([matrix], plans)[0] == pytest.approx(budget)
    assert max(gains) <= min(losses) * (1 + 1e-9)


@QUICK
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4),
    rows=st.sampled_from([16, 49, 192]),
    codebook=FORMS,
    nominal=st.booleans(),
    reserve=st.booleans(),
    per_weight=st.floats(0.5, 9),
)
def test_the_budget_is_never_exceeded_and_the_impossible_is_refused(
    seeds, rows, codebook, nominal, reserve, per_weight
):
    shares = (0.02, 0.1) if reserve else ()
    matrices = [
        random_choices(
            seed, 5 + seed, rows, (1, 2, 3, 4, 6), shares, codebook=codebook, nominal=nominal
        )
        for seed in seeds
    ]
    budget = per_weight * weights_of(matrices)
    cheapest = sum(matrix.bits(np.zeros(matrix.columns, dtype=int)) for matrix in matrices)
    if budget < cheapest:
        with pytest.raises(ConfigError, match=r"reach from [\d.]+ to [\d.]+"):
            allocate(matrices, budget)
        return
    bits, _ = outcome(matrices, allocate(matrices, budget))
    assert bits <= budget


@QUICK
@given(st.integers(0, 99), st.booleans(), FORMS, st.floats(3, 6), st.floats(0.001, 1))
def test_more_budget_never_raises_the_distortion(seed, nominal, codebook, per_weight, more):
    matrices = [
        random_choices(seed + at, 20, 192, (1, 2, 3, 4), codebook=codebook, nominal=nominal)
        for at in range(2)
    ]
    whole = weights_of(matrices)
    _, less = outcome(matrices, allocate(matrices, per_weight * whole))
    _, now = outcome(matrices, allocate(matrices, (per_weight + more) * whole))
    # the maps of widths and shared codebooks are no part of a column's own rate
    assert now <= less * (1 if nominal else 1.02) + 1e-12


def test_a_budget_for_everything_buys_everything():
    matrix = random_choices(0, columns=8)
    (plan,) = allocate([matrix], 100.0 * weights_of([matrix]))
    assert plan.column_bits.tolist() == [4] * 8


@QUICK
@given(st.integers(0, 99), st.booleans(), st.booleans())
def test_rates_are_what_a_matrix_of_such_columns_stores(seed, shared, scaled):
    codebook = KMeans(shared=shared, row_scales=scaled)
    matrix = random_choices(seed, 64, 100, shares=(0.05,), codebook=codebook, nominal=False)
    for option, (width, count) in enumerate(matrix.options.tolist()):
        whole = matrix.bits(np.full(64, option))
        beside = 16 * 100 * scaled + 16 * 2**width * shared
        counts = 64 * count.bit_length()
        assert whole == pytest.approx(64 * matrix.rates()[option] + beside + counts, abs=16)


def real_statistics(rows: int, columns: int, seed: int, spread: float = 1.0) -> ColumnStatistics:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.randn(columns, generator=generator).mul(spread).exp()
    weight[torch.rand(weight.shape, generator=generator) < 0.003] *= 15
    distortion = torch.randn(columns, generator=generator).mul(spread).exp()
    importance = torch.rand(rows, generator=generator) + 0.1
    return ColumnStatistics(weight, distortion, torch.arange(columns), "", importance)


def widths(statistics: ColumnStatistics, *options: object, **more: object) -> torch.Tensor:
    """The width of each column of one matrix with a codebook per column, and nothing reserved."""
    plain = {"codebooks": "own", "row_scales": "never", "reserve": False}
    rule = RateDistortion(*options, **{**plain, **more})
    return rule.plan_model({"": statistics}, KMeans())[""].columns.column_bits


def surrogate(choices: Choices, bits: torch.Tensor) -> float:
    """The distortion of widths without reservation."""
    return float(sum(choices.distortion[j, width - 1] for j, width in enumerate(bits.tolist())))


@pytest.mark.parametrize("target", [2.1, 2.5, 3.2])
def test_the_surrogate_is_no_worse_than_outlier_order_and_saliency_at_the_same_bits(target):
    statistics = real_statistics(128, 80, seed=0)
    options = column_options(128, range(1, 9), ())
    choices = measure_choices(statistics, KMeans(), options, nominal=True)
    paper = OutlierOrder(target).plan(statistics)
    saliency = paper.sort(descending=True).values[
        statistics.sensitivity().argsort(descending=True).argsort()
    ]
    assert saliency.double().mean() == paper.double().mean()
    planned = widths(statistics, target, "nominal")
    assert planned.double().mean() <= target
    found = surrogate(choices, planned)
    assert found < 0.8 * surrogate(choices, paper)
    assert found < 0.95 * surrogate(choices, saliency)


def test_measured_distortions_fall_with_bits_and_with_reservation():
    statistics = real_statistics(200, 30, seed=1)
    options = column_options(200, range(1, 9), (0.005, 0.02))
    assert options[:, 1].tolist() == [0] * 8 + [1] * 3 + [4] * 3
    table = measure_choices(statistics, KMeans(), options, nominal=True).distortion
    assert (np.diff(table[:, :8], axis=1) < 0).all()
    assert table[:, 7] == pytest.approx(table[:, 3] / 256)  # beyond 4 bits a quarter for each
    assert (table[:, 8:11].mean(axis=0) < table[:, :3].mean(axis=0)).all()
    assert (table[:, 11:].mean(axis=0) < table[:, 8:11].mean(axis=0)).all()
    part = torch.tensor([3, 11, 29])
    sampled = measure_choices(statistics, KMeans(), options, nominal=True, columns=part)
    assert np.array_equal(sampled.distortion, table[part])


@pytest.mark.parametrize("shared", [False, True])
def test_row_scales_change_the_unit_of_fits_and_not_of_distortions(shared):
    statistics = real_statistics(150, 20, seed=2)
    statistics = replace(statistics, weight=statistics.weight * 7)
    options = column_options(150, (2, 3), ())
    found = {
        scaled: measure_choices(
            statistics, KMeans(shared=shared, row_scales=scaled), options, nominal=True
        ).distortion.sum()
        for scaled in (False, True)
    }
    # rows of one size gain nothing from scales, and a distortion in scaled units would be 49th
    assert found[True] == pytest.approx(found[False], rel=0.25)


def test_widths_beyond_those_measured_may_be_asked_for_alone():
    statistics = real_statistics(64, 12, seed=3)
    bits = widths(statistics, 6.5, "nominal", min_bits=6, max_bits=7)
    assert sorted(set(bits.tolist())) == [6, 7]
    assert bits.double().mean() == 6.5


@pytest.mark.parametrize("columns", [1, 3, 40])
def test_threads_and_repetition_change_nothing(columns):
    statistics = {str(at): real_statistics(96, columns, seed=at) for at in range(3)}
    threads = torch.get_num_threads()
    plans = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            plans.append(RateDistortion(3.5).plan_model(statistics, KMeans()))
    finally:
        torch.set_num_threads(threads)
    for name, first in plans[0].items():
        for other in plans[1:]:
            assert other[name].codebook == first.codebook
            assert torch.equal(other[name].columns.column_bits, first.columns.column_bits)
            assert torch.equal(other[name].columns.reserved_counts, first.columns.reserved_counts)


@pytest.mark.parametrize(("rows", "alike", "shared"), [(192, True, True), (4096, False, False)])
def test_codebooks_are_shared_by_few_rows_of_like_columns(rows, alike, shared):
    weight = torch.randn(rows, 48, generator=torch.manual_seed(4))
    if not alike:  # from two peaks to a heavy tail
        weight = weight.sign() * weight.abs() ** torch.linspace(0.2, 2, 48)
    statistics = {"": ColumnStatistics(weight, 1 / weight.square().mean(dim=0), torch.arange(48))}
    plans = RateDistortion(4.0, row_scales="never", reserve=False).plan_model(statistics, KMeans())
    assert plans[""].codebook.shared == shared  # 256 bits for a codebook of 16, 1.3 a weight of 192


def test_the_cheaper_of_two_equal_variants_is_chosen():
    own = random_choices(5, 12, 192, nominal=False)
    shared = replace(own, codebook=KMeans(shared=True))
    assert choose_variants([[own, shared], [shared, own]], [96, 96], 4.0 * 2 * 96 * 192) == [1, 0]


def test_rows_of_very_different_size_get_scales():
    statistics = real_statistics(256, 64, seed=6)
    weight = statistics.weight * 2.0 ** torch.linspace(-4, 4, 256)[:, None]
    even = 1 / weight.square().mean(dim=1)
    uneven = replace(statistics, weight=weight, row_weights=even)
    plans = RateDistortion(3.0, reserve=False).plan_model({"": uneven}, KMeans())
    assert plans[""].codebook.row_scales


@pytest.mark.case(46)
def test_columns_whose_errors_cost_more_get_more_bits():
    statistics = real_statistics(128, 40, seed=7, spread=0.0)
    dear = torch.ones(40)
    dear[5], dear[6] = 1000.0, 0.001
    bits = widths(replace(statistics, distortion_weight=dear), 3.0, "nominal", min_bits=1)
    others = bits[torch.arange(40) > 6].double()
    assert bits[5] > others.max()
    assert bits[6] < others.min()


def beside(layouts) -> float:
    """A header that grows with the number of widths."""
    return 1000.0 + sum(300.0 * len(layout.widths()) for layout in layouts.values())


@pytest.mark.case(45)
@pytest.mark.parametrize("count", ["linear", "nominal"])
@pytest.mark.parametrize("target", [2.0, 2.6, 3.3])
def test_a_model_keeps_its_budget_to_the_bit_and_uses_it(count, target):
    shapes = [(192, 64), (64, 192), (300, 48)]
    statistics = {str(at): real_statistics(*shape, seed=at) for at, shape in enumerate(shapes)}
    chosen = RateDistortion(target, count, min_bits=1)
    plans = chosen.plan_model(statistics, KMeans(), overhead=beside)
    bits = 0.0
    if count == "linear":
        bits = beside({name: KMeans().layout(192, plan.columns) for name, plan in plans.items()})
    for name, plan in plans.items():
        rows, columns = statistics[name].shape
        whole = column_options(rows, range(1, 9), (chosen.small, chosen.large))
        matrix = Choices(
            rows, whole, np.zeros((columns, len(whole))), plan.codebook, count == "nominal"
        )
        bits += matrix.bits(chosen_options(matrix, plan.columns))
    weights = sum(rows * columns for rows, columns in shapes)
    assert target * 0.99 < bits / weights <= target


@settings(max_examples=15)
@given(st.integers(0, 99), st.floats(2.2, 5.0), st.floats(0.1, 1.5), st.floats(-3, 3))
def test_a_head_beside_blocks_gets_more_bits_and_causes_less_loss_with_more_budget(
    seed, per_weight, more, dearness
):
    """A head has many rows, most of which hardly matter."""
    head = real_statistics(700, 12, seed)
    rare = torch.logspace(0, -4, 700)
    head = replace(
        head, row_weights=rare, distortion_weight=head.distortion_weight * 10.0**dearness
    )
    statistics = {"block": real_statistics(96, 40, seed + 1), "head": head}
    options = column_options(700, range(1, 9), ())
    table = measure_choices(head, KMeans(), options, nominal=False)
    plain = {"codebooks": "own", "row_scales": "never", "reserve": False}
    weights = sum(found.weight.numel() for found in statistics.values())
    outcomes = []
    for bits in (per_weight, per_weight + more):
        plans = RateDistortion(bits, **plain).plan_model(statistics, KMeans(), overhead=beside)
        layouts = {
            name: plan.codebook.layout(len(statistics[name].weight), plan.columns)
            for name, plan in plans.items()
        }
        stored = sum(layout.ledger().total for layout in layouts.values())
        assert stored + beside(layouts) <= bits * weights
        own = layouts["head"].ledger().total
        outcomes.append((stored, own, surrogate(table, plans["head"].columns.column_bits)))
    (stored, own, loss), (later, owned, lost) = outcomes
    assert later >= stored
    assert owned >= own - 100  # the map of widths may get shorter
    assert lost <= loss * 1.02


def test_rows_weigh_in_the_fits_only_where_that_is_asked():
    statistics = {"": real_statistics(192, 16, seed=8)}
    for asked in (True, False):
        plans = RateDistortion(3.0, row_weights=asked).plan_model(statistics, KMeans())
        assert (plans[""].row_weights is not None) == asked


def test_shares_of_the_work_add_up_to_one():
    statistics = {str(at): real_statistics(96, 16, seed=at) for at in range(3)}
    for changes in ({}, {"codebooks": "own", "row_scales": "never"}):
        shares: list[float] = []
        RateDistortion(3.5, **changes).plan_model(
            statistics, KMeans(), on_share=lambda share, _, shares=shares: shares.append(share)
        )
        assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("per_weight", [2.4, 2.6, 3.0, 5.5])
@pytest.mark.parametrize("codebooks", ["own", "shared"])
def test_the_expected_layout_keeps_the_budget_without_weights(per_weight, codebooks):
    layout = RateDistortion(per_weight, codebooks=codebooks).expected_layout(KMeans(), (512, 100))
    assert per_weight - 0.15 < layout.ledger().total / layout.weights <= per_weight
    assert (layout.kind == "shared_codebooks") == (codebooks == "shared")


@pytest.mark.parametrize("count", ["linear", "nominal"])
@pytest.mark.parametrize("codebooks", ["auto", "own", "shared"])
def test_a_plan_refuses_no_budget_that_a_survey_could_meet(count, codebooks):
    shapes = {"a": (192, 24), "b": (49, 10)}
    statistics = {name: real_statistics(*shape, 0) for name, shape in shapes.items()}
    rule = RateDistortion(count=count, codebooks=codebooks, min_bits=2)

    def refused(bits: float, *, surveyed: bool) -> bool:
        at = replace(rule, target_bits=bits)
        try:
            if surveyed:
                at.plan_model(statistics, KMeans(), overhead=beside)
            else:
                at.planned_layouts(recipe(), shapes, beside)
        except ConfigError:
            return True
        return False

    low, high = 0.0, 8.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if refused(middle, surveyed=False) else (low, middle)
    assert low > 1.9
    assert refused(low - 0.01, surveyed=True)
    assert not refused(high + 0.5, surveyed=True)


@pytest.mark.parametrize(
    "options",
    [
        {"count": "galaxy"},
        {"importance": "galaxy"},
        {"codebooks": "galaxy"},
        {"row_scales": "galaxy"},
        {"min_bits": 0},
        {"min_bits": 5, "max_bits": 4},
        {"max_bits": 9},
        {"windows": 0},
        {"small": 0.0},
        {"small": 0.1, "large": 0.05},
    ],
    ids=str,
)
def test_impossible_options_are_refused_by_name(options):
    name = {"max_bits": "min_bits", "large": "small"}.get(next(iter(options)), next(iter(options)))
    with pytest.raises(ConfigError, match=rf"allocation\.{name}"):
        RateDistortion(**options)


def test_other_codebooks_and_rules_beside_it_are_refused():
    rule, alone = RateDistortion(), NoPrecision()
    rule.check(recipe(precision=alone))
    for wrong, message in [
        (recipe(), "precision=none reservation=none"),
        (recipe(precision=alone, reservation=FixedShare()), "reservation=none"),
        (recipe(precision=alone, codebook=Quantile()), "codebook=kmeans"),
    ]:
        with pytest.raises(ConfigError, match=message):
            rule.check(wrong)
    NoAllocation().check(recipe())
    with pytest.raises(ConfigError, match="allocation=rate_distortion"):
        NoAllocation().check(recipe(precision=alone))


@pytest.mark.parametrize("count", ["linear", "nominal"])
def test_the_layouts_that_are_planned_leave_room_for_what_comes_beside(count):
    shapes = {"a": (512, 100), "b": (512, 100), "c": (256, 64)}
    rule = RateDistortion(3.0, count)
    layouts = rule.planned_layouts(recipe(precision=NoPrecision()), shapes, lambda _: 20_000.0)
    weights = sum(rows * columns for rows, columns in shapes.values())
    stored = sum(layout.ledger().total for layout in layouts.values())
    assert layouts["a"] == layouts["b"]
    if count == "linear":
        assert 2.75 < (stored + 20_000) / weights <= 3.0
    else:
        assert sum(x.nominal_bits() * x.weights for x in layouts.values()) / weights <= 3.0


def surveyed(rows: int, columns: int, seed: int, spread: float) -> ColumnStatistics:
    """A matrix whose groups of 32 columns of a row differ in size, by `spread`."""
    dice = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(rows, -(-columns // 32), generator=dice))
    weight = torch.randn(rows, columns, generator=dice)
    weight *= sizes.repeat_interleave(32, dim=1)[:, :columns]
    return ColumnStatistics(weight, torch.rand(columns, generator=dice), torch.arange(columns))


@pytest.mark.parametrize("target", [2.3, 3.3, 4.5])
@pytest.mark.parametrize("reserve", [True, False])
def test_columns_of_tables_get_widths_within_the_budget(target, reserve):
    statistics = {str(seed): surveyed(64, 96, seed, seed / 4) for seed in range(6)}
    rule = RateDistortion(target, reserve=reserve)
    plans = rule.plan_model(statistics, GroupTableCodebook(32, 6))
    layouts = [plan.codebook.layout(64, plan.columns) for plan in plans.values()]
    assert any(len(layout.widths()) > 1 for layout in layouts)
    stored = sum(layout.ledger().total for layout in layouts)
    weights = sum(layout.weights for layout in layouts)
    assert target - 0.05 < stored / weights <= target
    assert reserve or not any(layout.reserved for layout in layouts)


def test_tables_are_taken_where_they_are_better_alone():
    statistics = {"even": surveyed(64, 96, 1, 0.0), "uneven": surveyed(64, 96, 2, 1.5)}
    plans = RateDistortion(4.0, tables=True, reserve=False).plan_model(statistics, KMeans())
    assert isinstance(plans["uneven"].codebook, GroupTableCodebook)
    plain = RateDistortion(4.0, reserve=False).plan_model(statistics, KMeans())
    assert all(isinstance(plan.codebook, KMeans) for plan in plain.values())


@pytest.mark.parametrize("count", [0, 3])
def test_the_errors_of_tables_are_about_those_of_rounding_to_them(count):
    statistics = replace(surveyed(300, 200, 3, 0.5), row_weights=torch.rand(300))
    rule = GroupTableCodebook(32)
    options = np.array([(2, count), (4, count)])
    found = rule.distortions(statistics, options)
    for place, (bits, reserved) in enumerate(options.tolist()):
        plan = ColumnPlan(torch.full((200,), bits, dtype=torch.uint8), torch.full((200,), reserved))
        columns = rule.start(statistics, plan)
        for column in range(200):
            columns.code_column(column, statistics.weight[:, column].contiguous().numpy())
        missed = (columns.payload().dequantize() - statistics.weight).double().square()
        exact = statistics.row_weights.double() @ missed
        cost = statistics.distortion_weight.double()
        # the largest entries take part in the scales that are measured, and not in those that stay
        measured = float(found[:, place] @ cost.numpy())
        assert (0.9 if count else 0.95) < measured / float(exact @ cost) < (1.35 if count else 1.1)


def test_wider_tables_than_are_measured_quarter_the_error_with_every_bit():
    options = column_options(32, [3, 4, 5, 6], ())
    found = measure_tables(surveyed(32, 64, 4, 0.5), GroupTableCodebook(), options, nominal=True)
    errors = found.distortion
    assert errors[:, 0].sum() > 2 * errors[:, 1].sum()
    for beyond in (1, 2, 3):
        assert errors[:, beyond].tolist() == pytest.approx(
            (errors[:, 1] / 4.0 ** (beyond - 1)).tolist()
        )
    assert found.rates().tolist() == [32 * bits for bits in (3, 4, 5, 6)]
