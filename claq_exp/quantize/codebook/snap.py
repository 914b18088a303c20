"""Levels of a column are moved to those of a set.  Compiled by numba and cached on disk."""

from __future__ import annotations

import numpy as np
from numba import njit

from claq_exp.quantize.codebook.basics import HALF_MAX, assign_codes, round_half

SCALES = 24  # that are tried for a column
LEAST_SCALE, MOST_SCALE = 0.75, 1.25  # over the largest level


@njit(cache=True, nogil=True, error_model="numpy")
def snap_levels(values, weights, level_set, levels):  # type: ignore[no-untyped-def]
    """Move levels to those of a set times one scale; return the scale, a float16.

    values, weights: [n] float32.  level_set: [any] float32, ascending from -1 to 1.
    levels: [entries] float32, ascending, at most as many as the set has; overwritten, ascending.
    Of SCALES scales that is taken whose levels lie nearest, each level weighing what the values
    around it do.  Two levels never become one (DFSQ, arXiv 2305.05888).
    """
    entries = len(levels)
    codes = np.empty(len(values), dtype=np.uint8)
    assign_codes(values, levels, codes)
    mass = np.zeros(entries)
    for row in range(len(values)):
        mass[codes[row]] += weights[row]
    top = max(abs(levels[0]), abs(levels[entries - 1]))
    best, least = round_half(top), np.inf
    places, chosen = np.empty(entries, dtype=np.int64), np.empty(entries, dtype=np.int64)
    for step in range(SCALES):
        share = LEAST_SCALE + (MOST_SCALE - LEAST_SCALE) * step / (SCALES - 1)
        scale = round_half(np.float32(top * share))
        _nearest_places(levels, level_set, scale, places)
        error = 0.0
        for entry in range(entries):
            miss = np.float64(levels[entry]) - np.float64(scale * level_set[places[entry]])
            error += mass[entry] * miss * miss
        if error < least and scale <= HALF_MAX:
            best, least = scale, error
            chosen[:] = places
    if least == np.inf:  # nothing has weight, or all is 0
        _nearest_places(levels, level_set, best, chosen)
    for entry in range(entries):
        levels[entry] = best * level_set[chosen[entry]]
    return best


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest_places(levels, level_set, scale, places):  # type: ignore[no-untyped-def]
    """Write ascending places in a set, no two alike, near the ascending levels over a scale."""
    entries, known = len(levels), len(level_set)
    place = 0
    for entry in range(entries):
        left = known - entries + entry  # the last place that leaves one for each level behind
        while place < left and abs(scale * level_set[place + 1] - levels[entry]) <= abs(
            scale * level_set[place] - levels[entry]
        ):
            place += 1
        places[entry] = place
        place = min(place + 1, known - 1)
