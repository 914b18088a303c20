"""How sure a difference of two runs is: over evaluation windows, or over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr, stdtrit

from claq_exp.run_folder.windows import Windows

LEVEL = 0.95
RESAMPLES = 10_000
LEAST_WINDOWS = 6  # of fewer, all could agree by chance in more than 5 % of cases: 2 x 2^-5
MOST_WINDOWS = 512  # beyond, neighbours are taken together: less memory, and they are alike


@dataclass(frozen=True)
class Interval:
    """A difference B - A and the interval that covers it with a probability of 95 %.

    count: windows, or pairs of seeds, that it rests on.
    """

    value: float
    low: float
    high: float
    count: int

    def better(self, direction: str = "lower") -> str:
        """Return A or B, whichever is better, or nothing where zero is in the interval.

        direction: which values are better, lower or higher.
        """
        if self.low <= 0.0 <= self.high or math.isnan(self.low + self.high):
            return ""
        return "B" if (self.value < 0.0) == (direction == "lower") else "A"


def perplexity_interval(before: Windows, after: Windows) -> Interval | None:
    """Return how much B's perplexity is above A's, as a share of it: 0.02 is 2 %.

    before, after: A and B on the same windows.  None where a window's sum is not finite.
    """
    parts = (after.nll, before.nll, before.tokens)
    return _bootstrap(parts, lambda b, a, n: np.expm1((b - a) / n))


def kl_interval(before: Windows, after: Windows) -> Interval | None:
    """Return how much B's KL divergence is above A's, as a share of it.

    None where a sum is not finite, or A's is zero.
    """
    if math.fsum(before.kl) <= 0.0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return _bootstrap((after.kl, before.kl), lambda b, a: b / a - 1.0)


def seed_interval(differences: Sequence[float]) -> Interval | None:
    """Return the mean of paired differences and its t interval.

    differences: B - A, one a seed; two or more of them, all finite, or there is no interval.
    """
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    if count < 2 or not np.isfinite(values).all():
        return None
    mean = float(values.mean())
    reach = mean_reach(float(values.std(ddof=1)), count)
    return Interval(mean, mean - reach, mean + reach, count)


def mean_reach(deviation: float, count: int) -> float:
    """Return half the 95 % t interval of a mean.  deviation: sample standard deviation."""
    return float(stdtrit(count - 1, 0.5 + LEVEL / 2)) * deviation / math.sqrt(count)


def _bootstrap(
    parts: Sequence[Sequence[float]], statistic: Callable[..., np.ndarray]
) -> Interval | None:
    """Draw windows again and again, those of both runs together, and return the interval.

    parts: sequences of numbers, one a window.  statistic: of the sums of the parts, vectorized.

    The expanded percentile interval of Hesterberg (The American Statistician 69, 2015, section
    5.3): its levels are those at which normal data get the t interval, for the plain percentiles
    of few windows are too narrow.
    """
    values = np.asarray(parts, dtype=np.float64)  # [parts, windows]
    count = values.shape[1]
    if count < LEAST_WINDOWS or not np.isfinite(values).all():
        return None
    grouped = _neighbours(values)
    drawn = statistic(*(grouped @ _draws(grouped.shape[1]).T))
    low, high = np.quantile(drawn, tail_levels(grouped.shape[1]))
    return Interval(float(statistic(*grouped.sum(axis=1))), float(low), float(high), count)


def tail_levels(count: int) -> tuple[float, float]:
    """Return the quantiles of the resampled statistic that are the ends of the interval."""
    reach = math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.5 + LEVEL / 2)
    return float(ndtr(-reach)), float(ndtr(reach))


def _neighbours(values: np.ndarray) -> np.ndarray:
    """Return sums over neighbouring windows, where there are very many: [parts, groups]."""
    size = math.ceil(values.shape[1] / MOST_WINDOWS)
    return np.add.reduceat(values, range(0, values.shape[1], size), axis=1)


@lru_cache(maxsize=2)
def _draws(count: int) -> np.ndarray:
    """Return how often each window is in each resample: [RESAMPLES, count] float64."""
    generator = np.random.default_rng(0)
    return generator.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
