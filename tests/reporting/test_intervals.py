"""Intervals of differences against scipy's own, and what they must do on made data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from claq_exp.reporting import intervals
from claq_exp.reporting.intervals import (
    Interval,
    kl_interval,
    perplexity_interval,
    seed_interval,
    tail_levels,
)
from claq_exp.run_folder.windows import Windows

TOKENS = 511


def windows(nll, kl=()) -> Windows:
    count = len(nll)
    return Windows(("x",) * count, (TOKENS,) * count, tuple(nll), tuple(kl))


def texts(count: int, seed: int = 0) -> np.ndarray:
    """Mean losses of windows: texts are much further apart than two models on one text."""
    return np.random.default_rng(seed).normal(2.8, 0.4, count)


def runs(count: int, shift: float, noise: float = 0.01, seed: int = 0) -> tuple[Windows, Windows]:
    """A, and B whose loss a token is higher by `shift`, and by `noise` from window to window."""
    own = texts(count, seed)
    other = own + shift + np.random.default_rng(seed + 1).normal(0.0, noise, count)
    return windows(TOKENS * own, TOKENS * own), windows(TOKENS * other, TOKENS * other)


@pytest.mark.parametrize("count", [8, 24, 60])
def test_the_ends_are_scipys_percentiles_at_the_same_levels(count):
    before, after = runs(count, 0.02, noise=0.05)
    low, high = tail_levels(count)
    theirs = stats.bootstrap(
        (np.array(after.nll), np.array(before.nll)),
        lambda b, a, axis: np.expm1((b - a).mean(axis) / TOKENS),
        n_resamples=20_000,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=high - low,
        rng=np.random.default_rng(5),
    ).confidence_interval
    found = perplexity_interval(before, after)
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.1 * width)  # both are drawn at random
    assert found.high == pytest.approx(theirs.high, abs=0.1 * width)
    assert found.value == pytest.approx(
        math.exp(math.fsum(after.nll) / count / TOKENS - math.fsum(before.nll) / count / TOKENS)
        - 1.0
    )


def test_normal_data_get_the_t_interval():
    before, after = runs(24, 0.0, noise=0.02)
    theirs = stats.ttest_rel(after.nll, before.nll).confidence_interval(0.95)
    found = perplexity_interval(before, after)
    exact = [math.expm1(end / TOKENS) for end in theirs]
    width = exact[1] - exact[0]
    assert [found.low, found.high] == pytest.approx(exact, abs=0.1 * width)


@pytest.mark.parametrize("count", [8, 24])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(count):
    covered = 0
    for seed in range(300):
        before, after = runs(count, math.log1p(0.03), noise=0.05, seed=2 * seed)
        found = perplexity_interval(before, after)
        covered += found.low <= 0.03 <= found.high
    assert 0.92 < covered / 300 < 0.985


def test_the_ratio_of_divergences_is_that_of_their_sums():
    generator = np.random.default_rng(0)
    before, after = generator.gamma(2.0, 50.0, 24), generator.gamma(2.0, 55.0, 24)
    found = kl_interval(windows(before, before), windows(after, after))
    assert found.value == pytest.approx(after.sum() / before.sum() - 1.0)
    assert found.low < found.value < found.high
    back = kl_interval(windows(after, after), windows(before, before))
    assert 1 + back.low == pytest.approx(1 / (1 + found.high), rel=1e-3)


@settings(max_examples=20)
@given(count=st.integers(6, 40), seed=st.integers(0, 1000))
def test_a_run_against_itself_is_not_distinguishable(count, seed):
    before, _ = runs(count, 0.0, seed=seed)
    for interval in (perplexity_interval(before, before), kl_interval(before, before)):
        assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)
        assert interval.better() == interval.better("higher") == ""


@settings(max_examples=20)
@given(count=st.integers(8, 40), seed=st.integers(0, 1000), shift=st.sampled_from([-0.03, 0.03]))
def test_a_known_shift_is_found_from_either_side(count, seed, shift):
    before, after = runs(count, shift, noise=0.003, seed=seed)
    better, worse = ("B", "A") if shift < 0 else ("A", "B")
    for interval in (perplexity_interval, kl_interval):
        assert interval(before, after).better() == better
        assert interval(after, before).better() == worse
        assert interval(before, after).better("higher") == worse


def test_what_tells_nothing_has_no_interval():
    before, after = runs(5, 1.0)
    assert perplexity_interval(before, after) is None
    before, after = runs(8, 1.0)
    broken = windows([*after.nll[:-1], math.inf], [*after.kl[:-1], math.nan])
    assert perplexity_interval(before, broken) is None
    assert kl_interval(before, broken) is None
    assert kl_interval(windows(before.nll, [0.0] * 8), after) is None


def test_very_many_windows_are_taken_together(monkeypatch):
    before, after = runs(96, 0.01, noise=0.05)
    single = perplexity_interval(before, after)
    monkeypatch.setattr(intervals, "MOST_WINDOWS", 40)
    found = perplexity_interval(before, after)
    assert found.count == single.count == 96
    assert found.value == pytest.approx(single.value, rel=1e-12)
    assert found.high - found.low == pytest.approx(single.high - single.low, rel=0.5)
    assert intervals._draws(32).shape == (intervals.RESAMPLES, 32)


@settings(max_examples=30)
@given(values=st.lists(st.floats(-5.0, 5.0), min_size=2, max_size=9))
def test_seeds_get_scipys_t_interval(values):
    found = seed_interval(values)
    assert found.count == len(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    if np.std(values) > 1e-9:  # scipy says nan for equal values
        theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_equal_seeds_are_not_distinguishable_and_one_tells_nothing():
    assert seed_interval([0.0, 0.0, 0.0]) == Interval(0.0, 0.0, 0.0, 3)
    assert seed_interval([0.0, 0.0, 0.0]).better() == ""
    assert seed_interval([1.0]) is seed_interval([]) is None
    assert seed_interval([1.0, math.inf]) is None
