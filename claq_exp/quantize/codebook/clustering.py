"""One-dimensional k-means on sorted values: the best borders of a coarse grid, then refined.

The optimal cells of one-dimensional k-means are intervals, so that a clustering is a list of
borders in the sorted values, and a cell's squared error comes from prefix sums at its two borders.
Compiled by numba and cached on disk.  Sums are float64; every step is sequential, so the same input
gives the same output everywhere.
"""

from __future__ import annotations

import numpy as np
from numba import njit

GRID = 4  # coarse places for a border per entry
REACH = 3  # strides that a border may move in either direction at once
ROUNDS = 3  # tries per stride


@njit(cache=True, nogil=True)
def _explained(sums, start, stop):  # type: ignore[no-untyped-def]
    """Return size * mean^2 of values[start:stop]: the more is explained, the less error is left."""
    if stop <= start:
        return 0.0
    total = sums[stop] - sums[start]
    return total * total / (stop - start)


@njit(cache=True, nogil=True)
def _coarse_places(count, entries):  # type: ignore[no-untyped-def]
    """Return ascending places for borders: evenly spaced, and ever closer towards both ends.

    The ends must be fine, for a few outliers there may deserve cells of their own.
    """
    spacing = max(1, count // (GRID * entries))
    marked = np.zeros(count + 1, dtype=np.bool_)
    for place in range(0, count, spacing):
        marked[place] = True
    step = 1
    while step < spacing:
        marked[step] = marked[count - step] = True
        marked[min(step + (step + 1) // 2, count)] = True
        marked[max(count - step - (step + 1) // 2, 0)] = True
        step *= 2
    marked[count] = True
    return np.flatnonzero(marked)


@njit(cache=True, nogil=True)
def _best_borders(sums, places, entries):  # type: ignore[no-untyped-def]
    """Return the best borders among `places`, [entries + 1]: a dynamic program over cells.

    The best place of a cell's left border never moves left when its right border moves right or a
    cell is added, which bounds the search to O(places^2) in all.
    """
    last = len(places) - 1
    best = np.empty(last + 1)
    for right in range(last + 1):
        best[right] = _explained(sums, 0, places[right])
    came_from = np.zeros((entries + 1, last + 2), dtype=np.int64)
    for cell in range(2, entries + 1):
        reached = np.empty(last + 1)
        came_from[cell, last + 1] = last
        for right in range(last, -1, -1):
            top, origin = -1.0, right
            stop = min(came_from[cell, right + 1], right)
            for left in range(min(came_from[cell - 1, right], stop), stop + 1):
                value = best[left] + _explained(sums, places[left], places[right])
                if value > top:
                    top, origin = value, left
            reached[right] = top
            came_from[cell, right] = origin
        best = reached
    borders = np.zeros(entries + 1, dtype=np.int64)
    right = last
    borders[entries] = places[last]
    for cell in range(entries, 1, -1):
        right = came_from[cell, right]
        borders[cell - 1] = places[right]
    return borders


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
def fit_levels(values, entries):  # type: ignore[no-untyped-def]
    """Return `entries` ascending centroids of small squared error.

    The best clustering with borders on a coarse grid, then joint moves of all borders by strides
    that halve down to one value: close to the global optimum, at a cost that hardly grows with n.

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
    sums = np.empty(count + 1)
    sums[0] = 0.0
    for index in range(count):
        sums[index + 1] = sums[index] + (values[index] - shift)
    borders = _best_borders(sums, _coarse_places(count, entries), entries)
    stride = max(1, count // (2 * GRID * entries))
    while stride > 0:
        for _ in range(ROUNDS):
            if not _move_borders(sums, borders, stride):
                break
        stride //= 2
    filled = 0
    for entry in range(entries):
        size = borders[entry + 1] - borders[entry]
        if size > 0:
            centroids[filled] = (sums[borders[entry + 1]] - sums[borders[entry]]) / size + shift
            filled += 1
    centroids[filled:] = centroids[filled - 1]
    return centroids


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
