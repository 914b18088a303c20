"""Clusterings of a column over its sorted values: the global optimum, and cells of equal weight.

The optimal cells of one-dimensional k-means are intervals, so that a clustering is a list of
borders in the sorted values, and a cell's squared error comes from prefix sums at its two borders.
Compiled by numba and cached on disk.
"""

from __future__ import annotations

import numpy as np
from numba import njit

NEGLIGIBLE = 1e-10  # share of the weight; less would drown in the digits of prefix sums


@njit(cache=True, nogil=True, error_model="numpy")
def write_means(mass, moment, middle, borders, centroids):  # type: ignore[no-untyped-def]
    """Write the mean of each cell, ascending; an empty cell repeats the last mean.

    mass, moment: [points + 1] float64 prefix sums; moment is of values - middle.
    borders: [entries + 1] int64 into them.  centroids: [entries] float64, overwritten.
    """
    filled = 0
    for cell in range(len(borders) - 1):
        size = mass[borders[cell + 1]] - mass[borders[cell]]
        if size > 0.0:
            rise = moment[borders[cell + 1]] - moment[borders[cell]]
            centroids[filled] = middle + rise / size
            filled += 1
    for cell in range(filled, len(borders) - 1):
        centroids[cell] = centroids[filled - 1] if filled else 0.0


@njit(cache=True, nogil=True, error_model="numpy")
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


@njit(cache=True, nogil=True, error_model="numpy")
def fit_levels_exact(values, weights, centroids):  # type: ignore[no-untyped-def]
    """Write the centroids of least weighted squared error: a dynamic program over all values.

    The arguments of `claq_exp.quantize.codebook.clustering.fit_levels`.  Halving the range of right
    borders makes each layer cost O(n log n) (ckmeans.1d.dp; Wang and Song, The R Journal 3/2,
    2011).
    """
    entries = len(centroids)
    mass, moment = _sorted_sums(values, weights)
    points = len(mass) - 1
    if points <= entries:
        write_means(mass, moment, 0.0, np.minimum(np.arange(entries + 1), points), centroids)
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
    write_means(mass, moment, middle, borders, centroids)


@njit(cache=True, nogil=True, error_model="numpy")
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


@njit(cache=True, nogil=True, error_model="numpy")
def fit_quantiles(values, weights, centroids):  # type: ignore[no-untyped-def]
    """Write the means of cells of (nearly) equal weight: the arguments of `fit_levels_exact`."""
    mass, moment = _sorted_sums(values, weights)
    points, entries = len(mass) - 1, len(centroids)
    borders = np.empty(entries + 1, dtype=np.int64)
    for cell in range(entries + 1):
        share = mass[points] * cell / entries
        borders[cell] = min(np.searchsorted(mass, share), points)
    borders[entries] = points
    write_means(mass, moment, 0.0, borders, centroids)
