"""One-dimensional weighted k-means in the time of a few passes over the column.

The optimal cells of one-dimensional k-means are intervals, so that a clustering is a list of
borders in the sorted values, and a cell's squared error comes from prefix sums at its two borders.
Sorting would cost more than all the rest; instead the values fall into fine bins, whose masses and
moments are exact, and borders are sought between bins: the best of a coarse grid, then joint moves
in strides that halve.  Compiled by numba and cached on disk; every step is sequential, so the same
input gives the same output.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BINS = 512  # up to 16 entries; more entries get more bins
MOST_BINS = 4096
SPREADS = np.float32(3.5)  # mean absolute deviations from the middle where half of the bins lie
GRID = 4  # coarse places for a border per entry, up to 16 entries
FEW = 12  # up to so many filled bins per entry, every border is such a place
FEWEST = 7  # up to so many, a bin may hide what matters (outliers side by side): no bins at all
NEGLIGIBLE = 1e-10  # share of the weight; less would drown in the digits of prefix sums
REACH = 3  # strides that a border may move in either direction at once
WIDTH = 2 * REACH + 1
REASSOCIATE = {"reassoc", "contract", "nsz"}


@njit(cache=True, nogil=True, fastmath=REASSOCIATE)
def _middle_and_spread(values):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for value in values:
        total += value
    middle = total / np.float32(len(values))
    spread = np.float32(0.0)
    for value in values:
        spread += abs(value - middle)
    return middle, spread / np.float32(len(values))


@njit(cache=True, nogil=True)
def bin_values(values, weights, entries):  # type: ignore[no-untyped-def]
    """Return (mass, moment, middle): prefix sums over the filled bins, [points + 1] float64 each.

    values, weights: [n] float32; what has no weight is left out.  moment is of values - middle.
    Bins are fine around the middle and ever wider outwards, so that no range need be known.
    """
    middle, spread = _middle_and_spread(values)
    bins = BINS if entries <= 16 else min(32 * entries, MOST_BINS)
    scale = SPREADS * (spread if spread > 0 else np.float32(1.0))
    half = np.float32(0.5) * np.float32(bins - 1)
    places = np.empty(len(values), dtype=np.int32)
    for index in range(len(values)):
        offset = values[index] - middle
        share = offset / (scale + abs(offset))
        place = half * share + half + np.float32(0.5)
        places[index] = np.int32(place) if place >= 0.0 else np.int32(0)  # NaN needs one too
    masses, moments = np.zeros(bins), np.zeros(bins)
    for index in range(len(values)):
        weight = np.float64(weights[index])
        masses[places[index]] += weight
        moments[places[index]] += weight * (values[index] - middle)
    mass, moment = np.empty(bins + 1), np.empty(bins + 1)
    mass[0] = moment[0] = 0.0
    points, least = 0, NEGLIGIBLE * masses.sum()
    for place in range(bins):
        if masses[place] > least:
            mass[points + 1] = mass[points] + masses[place]
            moment[points + 1] = moment[points] + moments[place]
            points += 1
    return mass[: points + 1], moment[: points + 1], middle


@njit(cache=True, nogil=True)
def _coarse_places(points, entries):  # type: ignore[no-untyped-def]
    """Return ascending places for borders: evenly spaced, and ever closer towards both ends.

    The ends must be fine, for a few outliers there may deserve cells of their own.
    """
    grid = GRID if entries <= 16 else 2
    spacing = max(1, points // (grid * entries))
    if entries <= 16 and points <= FEW * entries:
        spacing = 1
    places = np.empty(points + 1, dtype=np.int64)
    places[0] = last = 0
    while places[last] < points // 2:
        step = max(1, min(spacing, places[last] // 2))
        places[last + 1] = min(places[last] + step, points // 2)
        last += 1
    for mirrored in range(last - 1, -1, -1):
        place = points - places[mirrored]
        if place > places[last]:
            last += 1
            places[last] = place
    return places[: last + 1]


@njit(cache=True, nogil=True)
def _best_borders(mass, moment, places, entries):  # type: ignore[no-untyped-def]
    """Return the best borders among `places`, [entries + 1]: a dynamic program over cells.

    A cell explains moment^2 / mass of the squared values, and what is explained is not left as
    error.  The best place of a cell's left border never moves left when its right border moves
    right or a cell is added, which bounds the search to O(places^2) in all.
    """
    last = len(places) - 1
    masses, moments = mass[places], moment[places]
    best, reached = np.zeros(last + 1), np.zeros(last + 1)
    for right in range(1, last + 1):
        best[right] = moments[right] * moments[right] / masses[right]
    came_from = np.zeros((entries + 1, last + 2), dtype=np.int32)
    for cell in range(2, entries + 1):
        came_from[cell, last + 1] = last
        for right in range(last, cell - 1, -1):
            top, origin = -1.0, right - 1
            first = max(came_from[cell - 1, right], cell - 1)
            for left in range(first, min(came_from[cell, right + 1], right - 1) + 1):
                rise = moments[right] - moments[left]
                value = best[left] + rise * rise / (masses[right] - masses[left])
                if value > top:
                    top, origin = value, left
            reached[right] = top
            came_from[cell, right] = origin
        best, reached = reached, best
    borders = np.zeros(entries + 1, dtype=np.int64)
    right = last
    borders[entries] = places[last]
    for cell in range(entries, 1, -1):
        right = came_from[cell, right]
        borders[cell - 1] = places[right]
    return borders


@njit(cache=True, nogil=True)
def _move_borders(mass, moment, borders, stride):  # type: ignore[no-untyped-def]
    """Move all inner borders at once, each by up to REACH strides.

    A dynamic program over borders x candidates: unlike Lloyd's passes, which stop where no single
    border wants to move, it sees chains of borders that pay only when they move together.
    """
    entries, points = len(borders) - 1, borders[-1]
    best, masses, moments = np.zeros((2, WIDTH)), np.zeros((2, WIDTH)), np.zeros((2, WIDTH))
    came_from = np.zeros((entries + 1, WIDTH), dtype=np.int64)
    previous = 1  # candidates of the border before; the first stays at 0
    for border in range(1, entries + 1):
        old, new = (border - 1) % 2, border % 2
        candidates = WIDTH if border < entries else 1
        for candidate in range(candidates):
            place = points
            if border < entries:
                place = min(max(borders[border] + (candidate - REACH) * stride, 0), points)
            top, origin = -1.0, 0
            for earlier in range(previous):
                size = mass[place] - masses[old, earlier]
                rise = moment[place] - moments[old, earlier]
                value = best[old, earlier]
                if size > 0.0:
                    value += rise * rise / size
                elif size < 0.0:
                    value = -1.0
                if value > top:
                    top, origin = value, earlier
            best[new, candidate] = top
            masses[new, candidate], moments[new, candidate] = mass[place], moment[place]
            came_from[border, candidate] = origin
        previous = candidates
    candidate = came_from[entries, 0]
    for border in range(entries - 1, 0, -1):
        moved = min(max(borders[border] + (candidate - REACH) * stride, 0), points)
        candidate = came_from[border, candidate]
        borders[border] = moved


@njit(cache=True, nogil=True)
def _means(mass, moment, middle, borders, centroids):  # type: ignore[no-untyped-def]
    """Write the mean of each cell, ascending; an empty cell repeats the last mean."""
    filled = 0
    for cell in range(len(borders) - 1):
        size = mass[borders[cell + 1]] - mass[borders[cell]]
        if size > 0.0:
            rise = moment[borders[cell + 1]] - moment[borders[cell]]
            centroids[filled] = middle + rise / size
            filled += 1
    for cell in range(filled, len(borders) - 1):
        centroids[cell] = centroids[filled - 1] if filled else 0.0


@njit(cache=True, nogil=True)
def fit_levels(values, weights, centroids):  # type: ignore[no-untyped-def]
    """Write ascending centroids of small weighted squared error.

    values, weights: [n] float32, finite, in any order; weights not negative.
    centroids: [entries] float64, overwritten; where there are no more distinct values than entries,
    these values themselves, the last one repeated; zeros where nothing has weight.
    """
    entries = len(centroids)
    mass, moment, middle = bin_values(values, weights, entries)
    points = len(mass) - 1
    if points <= (FEWEST * entries if entries <= 16 else entries):
        fit_levels_exact(values, weights, centroids)  # costs little here
        return
    borders = _best_borders(mass, moment, _coarse_places(points, entries), entries)
    stride = max(1, points // (2 * GRID * entries))
    while stride > 0:
        _move_borders(mass, moment, borders, stride)
        stride //= 2
    _means(mass, moment, middle, borders, centroids)


@njit(cache=True, nogil=True)
def _sorted_sums(values, weights):  # type: ignore[no-untyped-def]
    """Return (mass, moment) prefix sums over the distinct weighted values, ascending."""
    order = np.argsort(values)
    mass, moment = np.zeros(len(values) + 1), np.zeros(len(values) + 1)
    points, last, total = 0, 0.0, 0.0
    for weight in weights:
        total += np.float64(weight)
    for row in order:
        value, weight = np.float64(values[row]), np.float64(weights[row])
        if weight > NEGLIGIBLE * total:
            if points == 0 or value > last:
                points += 1
                mass[points], moment[points] = mass[points - 1], moment[points - 1]
                last = value
            mass[points] += weight
            moment[points] += weight * value
    return mass[: points + 1], moment[: points + 1]


@njit(cache=True, nogil=True)
def fit_levels_exact(values, weights, centroids):  # type: ignore[no-untyped-def]
    """Write the centroids of the global optimum: the arguments of `fit_levels`.

    A dynamic program over all distinct values, halving the range of right borders so that each
    layer costs O(n log n) (ckmeans.1d.dp; Wang and Song, The R Journal 3/2, 2011).
    """
    entries = len(centroids)
    mass, moment = _sorted_sums(values, weights)
    points = len(mass) - 1
    if points <= entries:
        _means(mass, moment, 0.0, np.minimum(np.arange(entries + 1), points), centroids)
        return
    middle = moment[points] / mass[points]  # centred sums keep their digits
    for place in range(points + 1):
        moment[place] -= middle * mass[place]
    best, reached = np.zeros(points + 1), np.zeros(points + 1)
    for right in range(1, points + 1):
        best[right] = moment[right] * moment[right] / mass[right]
    came_from = np.zeros((entries + 1, points + 1), dtype=np.int32)
    for cell in range(2, entries + 1):
        _exact_layer(mass, moment, best, reached, came_from[cell], cell)
        best, reached = reached, best
    borders = np.zeros(entries + 1, dtype=np.int64)
    borders[entries] = points
    for cell in range(entries, 1, -1):
        borders[cell - 1] = came_from[cell, borders[cell]]
    _means(mass, moment, middle, borders, centroids)


@njit(cache=True, nogil=True)
def fit_quantiles(values, weights, centroids):  # type: ignore[no-untyped-def]
    """Write the means of cells of (nearly) equal weight: the arguments of `fit_levels`."""
    mass, moment = _sorted_sums(values, weights)
    points, entries = len(mass) - 1, len(centroids)
    borders = np.empty(entries + 1, dtype=np.int64)
    for cell in range(entries + 1):
        share = mass[points] * cell / entries
        borders[cell] = min(np.searchsorted(mass, share), points)
    borders[entries] = points
    _means(mass, moment, 0.0, borders, centroids)


@njit(cache=True, nogil=True)
def _exact_layer(mass, moment, best, reached, came_from, cell):  # type: ignore[no-untyped-def]
    """Fill one layer of the dynamic program, right borders in halving order on a stack."""
    points = len(mass) - 1
    stack = np.empty((64, 4), dtype=np.int64)
    stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = cell, points, cell - 1, points - 1
    depth = 1
    while depth:
        depth -= 1
        low, high, first, final = stack[depth]
        right = (low + high) // 2
        top, origin = -1.0, first
        for left in range(first, min(final, right - 1) + 1):
            rise = moment[right] - moment[left]
            value = best[left] + rise * rise / (mass[right] - mass[left])
            if value > top:
                top, origin = value, left
        reached[right], came_from[right] = top, origin
        if low < right:
            stack[depth] = np.array([low, right - 1, first, origin])
            depth += 1
        if right < high:
            stack[depth] = np.array([right + 1, high, origin, final])
            depth += 1
