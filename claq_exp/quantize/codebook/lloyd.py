"""One-dimensional k-means on sorted values: prefix sums, Lloyd's passes, joint border moves.

Compiled by numba and cached on disk.  All sums are float64, so that the result does not depend on
the scale of the values; every step is sequential, so the same input gives the same output
everywhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit

REACH = 4  # strides that a border may move in either direction at once
ROUNDS = 4  # tries per stride
SPACINGS = 128  # at most so many gaps describe the density for the first guess


@njit(cache=True, nogil=True)
def _first_guess(values, entries):  # type: ignore[no-untyped-def]
    """Place centroids with density ~ f^(1/3), optimal for many levels (Panter and Dite, 1951)."""
    count = len(values)
    steps = min(SPACINGS, count - 1)
    reached = np.empty(steps + 1)
    reached[0] = 0.0
    for step in range(steps):
        left = values[step * (count - 1) // steps]
        right = values[(step + 1) * (count - 1) // steps]
        reached[step + 1] = reached[step] + (right - left) ** (2.0 / 3.0)
    centroids = np.empty(entries)
    step = 0
    for entry in range(entries):
        target = reached[steps] * (entry + 0.5) / entries
        while step < steps - 1 and reached[step + 1] < target:
            step += 1
        left = values[step * (count - 1) // steps]
        right = values[(step + 1) * (count - 1) // steps]
        width = reached[step + 1] - reached[step]
        share = (target - reached[step]) / width if width > 0 else 0.5
        centroids[entry] = left + share * (right - left)
    return centroids


@njit(cache=True, nogil=True)
def _first_above(values, bound, low, high):  # type: ignore[no-untyped-def]
    """Return the first index in [low, high] whose value is above `bound`."""
    while low < high:
        middle = (low + high) // 2
        if values[middle] > bound:
            high = middle
        else:
            low = middle + 1
    return low


@njit(cache=True, nogil=True)
def _lloyd(values, sums, centroids, borders, max_iterations):  # type: ignore[no-untyped-def]
    """Alternate nearest-centroid cells and cell means, in place, until the cells stay."""
    count, entries = len(values), len(centroids)
    for _ in range(max_iterations):
        moved = False
        for entry in range(1, entries):
            middle = 0.5 * (centroids[entry - 1] + centroids[entry])
            border = _first_above(values, middle, borders[entry - 1], count)
            if border != borders[entry]:
                borders[entry] = border
                moved = True
        if not moved:
            return
        for entry in range(entries):
            size = borders[entry + 1] - borders[entry]
            if size > 0:
                centroids[entry] = (sums[borders[entry + 1]] - sums[borders[entry]]) / size


@njit(cache=True, nogil=True)
def _explained(sums, start, stop):  # type: ignore[no-untyped-def]
    """Return size * mean^2 of values[start:stop]: the more is explained, the less error is left."""
    if stop <= start:
        return 0.0
    total = sums[stop] - sums[start]
    return total * total / (stop - start)


@njit(cache=True, nogil=True)
def _move_borders(sums, borders, stride):  # type: ignore[no-untyped-def]
    """Move all inner borders at once, each by up to REACH strides; return whether one moved.

    A dynamic program over borders x candidates: unlike Lloyd's passes, which stop where no single
    border wants to move, it sees chains of borders that pay only when they move together.
    """
    entries, count, width = len(borders) - 1, borders[-1], 2 * REACH + 1
    best = np.zeros(width)
    at = np.zeros(width, dtype=np.int64)  # where the border before may stand; the first stays at 0
    came_from = np.zeros((entries + 1, width), dtype=np.int64)
    previous = 1
    for border in range(1, entries + 1):
        candidates = width if border < entries else 1
        reached = np.empty(width)
        places = np.empty(width, dtype=np.int64)
        for candidate in range(candidates):
            place = count if border == entries else borders[border] + (candidate - REACH) * stride
            place = min(max(place, 0), count)
            places[candidate] = place
            top, origin = -1.0, -1
            for earlier in range(previous):
                if at[earlier] <= place and best[earlier] >= 0.0:
                    value = best[earlier] + _explained(sums, at[earlier], place)
                    if value > top:
                        top, origin = value, earlier
            reached[candidate] = top
            came_from[border, candidate] = origin
        best, at, previous = reached, places, candidates
    moved = False
    candidate = came_from[entries, 0]
    for border in range(entries - 1, 0, -1):
        place = min(max(borders[border] + (candidate - REACH) * stride, 0), count)
        candidate = came_from[border, candidate]
        if place != borders[border]:
            borders[border] = place
            moved = True
    return moved


@njit(cache=True, nogil=True)
def _distinct(values, limit):  # type: ignore[no-untyped-def]
    """Return the distinct sorted values, or the first limit + 1 of them."""
    found = np.empty(limit + 1)
    count = 0
    for value in values:
        if count == 0 or value > found[count - 1]:
            found[count] = value
            count += 1
            if count > limit:
                break
    return found[:count]


@njit(cache=True, nogil=True)
def fit_levels(values, entries, max_iterations):  # type: ignore[no-untyped-def]
    """Return `entries` ascending centroids of small squared error.

    Lloyd's passes from a good first guess, then joint moves of the cell borders by strides that
    halve down to one value: close to the global optimum, at a cost that hardly grows with n.

    values: [n] float32, sorted, finite, n may be 0.  Returns [entries] float64; where there are no
    more distinct values than entries, these values themselves, the last one repeated.
    """
    centroids = np.zeros(entries)
    distinct = _distinct(values, entries)
    if len(distinct) <= entries:
        for entry in range(entries):
            if len(distinct) > 0:
                centroids[entry] = distinct[min(entry, len(distinct) - 1)]
        return centroids
    count = len(values)
    shift = np.float64(values[count // 2])  # centred sums keep their digits
    centred = np.empty(count)
    sums = np.empty(count + 1)
    sums[0] = 0.0
    for index in range(count):
        centred[index] = values[index] - shift
        sums[index + 1] = sums[index] + centred[index]
    centroids = _first_guess(centred, entries)
    borders = np.zeros(entries + 1, dtype=np.int64)
    borders[entries] = count
    _lloyd(centred, sums, centroids, borders, max_iterations)
    stride = max(1, count // (entries * REACH // 2))
    while stride > 0:
        for _ in range(ROUNDS):
            if not _move_borders(sums, borders, stride):
                break
        stride //= 2
    for entry in range(entries):
        size = borders[entry + 1] - borders[entry]
        if size > 0:
            centroids[entry] = (sums[borders[entry + 1]] - sums[borders[entry]]) / size
    return np.sort(centroids) + shift


@njit(cache=True, nogil=True)
def assign_codes(values, levels, codes):  # type: ignore[no-untyped-def]
    """Write the index of the nearest level (the lower one on a tie) of each value.

    values: [n] float32.  levels: [k] float32, ascending.  codes: [n] uint8, overwritten.
    """
    codes[:] = 0
    for level in range(len(levels) - 1):
        middle = np.float32(0.5) * (levels[level] + levels[level + 1])
        for index in range(len(values)):
            codes[index] += values[index] > middle
