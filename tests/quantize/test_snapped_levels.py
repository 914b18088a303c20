"""Levels of columns that stand in one set: the sets, the snap, and what is stored."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_references import random_problem, recipe, solve

from claq_exp.allocate import RateDistortion
from claq_exp.errors import ConfigError
from claq_exp.number_formats.level_sets import TERMS, level_set
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.codebook.snap import LEAST_SCALE, MOST_SCALE, SCALES, snap_levels
from claq_exp.quantize.precision import Fixed, NoPrecision

SETS = [(name, bits) for name in ("apot", "grid") for bits in (6, 7, 8)]


@pytest.mark.parametrize(("name", "bits"), SETS)
def test_a_set_is_ascending_symmetric_and_fits_its_index(name, bits):
    levels = level_set(name, bits)
    assert len(levels) == 2**bits - (name == "apot")
    assert (levels.diff() > 0).all()
    assert torch.equal(levels, -levels.flip(0))
    assert levels[-1] == 1


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_the_levels_of_apot_are_all_sums_of_four_powers_of_two(bits):
    terms = [[0.0, *(2.0**-e for e in exponents)] for exponents in TERMS[bits]]
    assert len(terms) == 4
    sums = {sum(term) for term in product(*terms)}
    expected = sorted({sign * value / max(sums) for value in sums for sign in (-1, 1)})
    assert level_set("apot", bits).tolist() == torch.tensor(expected).tolist()


def snapped(levels: np.ndarray, known: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    moved = levels.astype(np.float32).copy()
    scale = snap_levels(levels.astype(np.float32), weights.astype(np.float32), known, moved)
    return float(scale), moved


def best_of_all(levels: np.ndarray, known: np.ndarray, weights: np.ndarray) -> float:
    """The least error of any scale that is tried and any levels of the set, in float64."""
    top = np.float32(np.abs(levels).max())
    best = np.inf
    for share in np.linspace(LEAST_SCALE, MOST_SCALE, SCALES):
        scale = float(np.float16(np.float32(top * share)))
        for chosen in combinations(known.astype(np.float64) * scale, len(levels)):
            best = min(best, float((weights * (levels - np.array(chosen)) ** 2).sum()))
    return best


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(2, 3))
def test_a_snap_is_close_to_the_best_of_all_choices(seed, entries):
    dice = np.random.default_rng(seed)
    known = np.sort(dice.choice(level_set("apot", 6).numpy(), 12, replace=False))
    known[0], known[-1] = -1, 1
    levels = np.sort(dice.normal(size=entries)).astype(np.float32).astype(np.float64)
    weights = dice.uniform(0.1, 1, entries).astype(np.float32).astype(np.float64)
    scale, moved = snapped(levels, known, weights)
    assert scale == float(np.float16(scale))
    assert (np.diff(moved) > 0).all()
    assert np.isin(moved, (np.float32(scale) * known).astype(np.float32)).all()
    found = float((weights * (levels - moved) ** 2).sum())
    best = best_of_all(levels, known, weights)
    assert best - 1e-6 <= found
    spread = float((weights * (levels - levels.mean()) ** 2).sum())
    assert found <= best + 0.2 * spread + 1e-6  # two levels that want one place yield one by one


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.sampled_from(SETS), st.integers(1, 4))
def test_levels_far_apart_are_each_at_their_nearest(seed, which, bits):
    known = level_set(*which).numpy()
    dice = np.random.default_rng(seed)
    places = np.sort(dice.choice(np.arange(2, len(known) - 2, 3), 2**bits, replace=False))
    step = np.diff(known).min()
    levels = known[places].astype(np.float64) + dice.uniform(-0.2, 0.2, len(places)) * step
    scale, moved = snapped(levels, known, np.ones(len(levels)))
    nearest = known[np.abs(levels[:, None] / scale - known[None]).argmin(1)] * np.float32(scale)
    if (np.diff(nearest) > 0).all():
        error = ((levels - moved) ** 2).sum()
        assert error <= ((levels - nearest) ** 2).sum() * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("levels", [[0.0, 0.0], [-1e-7, 1e-7], [-65504.0, 65504.0], [3.0, 3.0]])
def test_extreme_levels_stay_finite_and_in_order(levels):
    values = np.array(levels)
    scale, moved = snapped(values, level_set("grid", 6).numpy(), np.ones(2))
    assert np.isfinite(scale)
    assert np.isfinite(moved).all()
    assert (np.diff(moved) >= 0).all()


@pytest.mark.parametrize(("name", "bits"), SETS)
def test_codes_choose_the_nearest_level_of_the_column_and_cost_what_is_said(name, bits):
    """The last step codes each column anew: nothing but its own levels is open to it."""
    weight, hessian = random_problem(rows=80, columns=12, seed=bits)
    made = solve(
        weight,
        hessian,
        recipe(codebook=KMeans(snap=name, snap_bits=bits), precision=Fixed(3)),
    ).quantized
    free = solve(weight, hessian, recipe(codebook=KMeans(), precision=Fixed(3))).quantized
    stored = made.pack()
    assert {f"{d.dtype}" for d in stored.values()} == {"torch.uint8", "torch.float16"}
    indices = 8 * -(-8 * bits // 8)
    assert made.ledger().codebooks == 12 * indices
    assert made.ledger().scales == 12 * 16
    assert made.ledger().total == free.ledger().total + 12 * (indices + 16 - 8 * 16)
    assert made.levels().diff(dim=1).min() > 0


def test_a_finer_set_is_nearer_to_free_levels():
    torch.manual_seed(0)
    weight, identity = torch.randn(400, 16), torch.eye(16).double()

    def error(**snap: object) -> float:
        with_ = recipe(codebook=KMeans(**snap), precision=Fixed(4))
        return solve(weight, identity, with_).weight_error

    errors = [error(snap="grid", snap_bits=bits) for bits in (6, 7, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1.15 * error()
    assert errors[2] < 1.01 * error()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snap": "galaxy"}, "codebook.snap"),
        ({"snap": "apot", "snap_bits": 9}, "snap_bits is 9"),
        ({"snap": "apot", "shared": True}, "codebook.shared=false"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KMeans(**options)


def test_codes_as_long_as_the_index_are_refused():
    KMeans(snap="apot", snap_bits=6).check(5)
    with pytest.raises(ConfigError, match=r"fewer bits"):
        KMeans(snap="apot", snap_bits=6).check(6)


def test_an_allocation_without_a_width_that_a_set_allows_is_refused():
    snapped_by_seven = recipe(codebook=KMeans(snap="apot"), precision=NoPrecision())
    RateDistortion(min_bits=6).check(snapped_by_seven)
    with pytest.raises(ConfigError, match="fewer bits"):
        RateDistortion(min_bits=7).check(snapped_by_seven)


def test_an_allocation_snaps_codebooks_of_columns_and_leaves_shared_ones():
    variants = RateDistortion()._variants(KMeans(snap="grid", snap_bits=6))
    assert {(form.shared, form.snap) for form in variants} == {(True, "none"), (False, "grid")}
    assert RateDistortion()._widths(variants[-1]).stop == 6
