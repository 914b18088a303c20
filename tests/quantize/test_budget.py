"""A budget of bits is never exceeded, and what cannot be met is refused with what can."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import recipe

from claq_exp.allocate import NoAllocation, RateDistortion
from claq_exp.errors import ConfigError
from claq_exp.quantize.budget import BudgetConfig, fit_budget
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import Fixed, LayerMap, NoPrecision, OutlierOrder, Random
from claq_exp.quantize.recipe import Recipe, planned_layouts
from claq_exp.quantize.reservation import Fixed as FixedReservation

SHAPES = {"q": (576, 576), "k": (192, 576), "down": (576, 1536), "odd": (49, 130)}
QUICK = settings(max_examples=40)


def beside(layouts) -> float:
    """A header that grows with the number of stored tensors."""
    return 800.0 * sum(len(layout.stored_tensors()) for layout in layouts.values())


def bits_of(fitted: Recipe, kind: str) -> float:
    layouts = planned_layouts(fitted, SHAPES)
    weights = sum(layout.weights for layout in layouts.values())
    if kind == "nominal":
        return sum(layout.nominal_bits() * layout.weights for layout in layouts.values()) / weights
    stored = sum(layout.ledger().total for layout in layouts.values())
    return (stored + beside(layouts)) / weights


def fit(chosen: Recipe, bits: float | None, kind: str = "linear") -> Recipe:
    return fit_budget(chosen, BudgetConfig(bits, kind), SHAPES, beside)


@pytest.mark.case(42)
@QUICK
@given(
    st.sampled_from(
        [OutlierOrder(), Random(), OutlierOrder(low_bits=1, high_bits=8, target_bits=2)]
    ),
    st.sampled_from([0.0, 0.004, 0.02]),
    st.sampled_from(["linear", "nominal"]),
    st.floats(1.5, 7),
)
def test_what_is_planned_never_exceeds_the_budget_and_comes_close(precision, ratio, kind, bits):
    chosen = recipe(precision=precision, reservation=FixedReservation(ratio))
    try:
        fitted = fit(chosen, bits, kind)
    except ConfigError:
        lowest = precision.ranges()[0]
        assert (
            bits_of(
                recipe(precision=lowest[2](lowest[0]), reservation=FixedReservation(ratio)), kind
            )
            > bits
        )
        return
    assert bits_of(fitted, kind) <= bits
    highest = precision.ranges()[-1]
    if (
        fitted.precision.target_bits < highest[1] - 1e-6
        and not 2.99 < fitted.precision.target_bits < 3.01
    ):
        assert bits_of(fitted, kind) > bits - 0.05
    assert fitted.reservation == chosen.reservation
    assert fitted.codebook == chosen.codebook


@pytest.mark.parametrize(("bits", "width"), [(1.5, 1), (2.5, 2), (4.9, 4), (15.9, 8)])
def test_one_width_for_all_is_the_largest_that_fits(bits, width):
    chosen = recipe(precision=Fixed(3), codebook=KMeans(shared=True))
    fitted = fit(chosen, bits)
    assert fitted.precision == Fixed(width)
    assert bits_of(fitted, "linear") <= bits
    if width < 8:
        assert (
            bits_of(recipe(precision=Fixed(width + 1), codebook=KMeans(shared=True)), "linear")
            > bits
        )


def test_without_a_budget_the_recipe_stays_as_it_is():
    chosen = recipe(precision=OutlierOrder(2.2))
    assert fit(chosen, None) is chosen


def test_an_allocation_over_the_model_takes_the_budget_as_its_target():
    chosen = recipe(precision=NoPrecision())
    assert fit(chosen, 2.6, "nominal") is chosen
    budget = BudgetConfig(2.6, "nominal")
    assert RateDistortion(4.0).within(budget) == RateDistortion(2.6, count="nominal")
    assert RateDistortion(4.0).within(BudgetConfig()) == RateDistortion(4.0)
    assert NoAllocation().within(budget) == NoAllocation()


def test_more_bits_never_give_less_precision():
    targets = [
        fit(recipe(precision=OutlierOrder()), 2.2 + step / 20).precision.target_bits
        for step in range(34)
    ]
    assert targets == sorted(targets)


@pytest.mark.case(41, 44)
def test_an_impossible_budget_is_refused_with_the_range_that_can_be_reached():
    lowest, highest = (bits_of(recipe(precision=Fixed(bits)), "linear") for bits in (1, 8))
    with pytest.raises(ConfigError) as caught:
        fit(recipe(precision=Fixed(3)), 1.01)
    assert f"from {lowest:.3f} to {highest:.3f}" in str(caught.value)
    assert "budget.bits=1.01" in str(caught.value)


def test_a_precision_without_a_range_cannot_follow_a_budget():
    with pytest.raises(ConfigError, match="LayerMap cannot follow budget"):
        fit(recipe(precision=LayerMap()), 3.0)


@pytest.mark.case(41)
@pytest.mark.parametrize("bits", [0.0, -1.0, 16.0, 99.0])
def test_a_budget_that_is_none_is_refused(bits):
    with pytest.raises(ConfigError, match=r"budget\.bits"):
        BudgetConfig(bits)


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="linear, model, nominal"):
        BudgetConfig(2.0, "honest")


@QUICK
@given(st.floats(2.5, 9), st.integers(0, 10**6))
def test_a_budget_of_a_model_leaves_the_layers_what_others_do_not_take(bits, others):
    weights = sum(rows * columns for rows, columns in SHAPES.values())
    parameters, beside_them = weights + others, 5.0 * others
    try:
        own = BudgetConfig(bits, "model").for_layers(parameters, beside_them, SHAPES)
        layouts = planned_layouts(fit_budget(recipe(), own, SHAPES, beside), SHAPES)
    except ConfigError:
        return
    stored = sum(layout.ledger().total for layout in layouts.values()) + beside(layouts)
    assert (stored + beside_them) / parameters <= bits * (1 + 1e-12)


def test_a_budget_that_the_rest_of_the_model_uses_up_is_refused():
    with pytest.raises(ConfigError, match=r"takes 8\.000 alone; quantize the embedding too"):
        BudgetConfig(3.0, "model").for_layers(200, 1600.0, {"q": (10, 10)})


def test_other_kinds_of_budget_are_those_of_the_layers():
    for budget in (BudgetConfig(), BudgetConfig(3.0), BudgetConfig(3.0, "nominal")):
        assert budget.for_layers(200, 1600.0, {"q": (10, 10)}) is budget
