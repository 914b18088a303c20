"""Stretches a given codebook to a column: the scale and shift of least squared error."""

from __future__ import annotations

import numpy as np
from numba import njit

from claq_exp.quantize.codebook.clustering import bin_values

ITERATIONS = 12
STARTS = (1.0, 0.7, 0.85, 1.2)  # deviations of the column
FITTED, RANGE, ABSMAX = range(3)


@njit(cache=True, nogil=True, error_model="numpy")
def _fit(mass, moment, means, book, scale, shift):  # type: ignore[no-untyped-def]
    """Alternate nearest levels and least squares, as Lloyd does, over the points of `bin_values`.

    means: [points] float64, ascending.  book: [entries] float32, ascending.  Each step lowers the
    squared error or leaves it.  Returns (scale, shift, how much of the squared values they
    explain).
    """
    points = len(mass) - 1
    explained = 0.0
    for _ in range(ITERATIONS):
        ones = by_book = by_square = values = products = 0.0
        point = 0
        for entry in range(len(book)):
            start, high = point, points
            if entry + 1 < len(book):
                middle = shift + scale * 0.5 * (book[entry] + book[entry + 1])
                while point < high:  # the first point beyond the middle
                    half = (point + high) // 2
                    if means[half] <= middle:
                        point = half + 1
                    else:
                        high = half
            else:
                point = points
            size, rise = mass[point] - mass[start], moment[point] - moment[start]
            ones += size
            by_book += size * book[entry]
            by_square += size * book[entry] * book[entry]
            values += rise
            products += rise * book[entry]
        determinant = ones * by_square - by_book * by_book
        if determinant <= 1e-12 * ones * by_square:  # all in one cell
            break
        new = (ones * products - by_book * values) / determinant
        if new <= 0.0:
            break
        moved = abs(new - scale)
        scale, shift = new, (values - new * by_book) / ones
        explained = scale * products + shift * values
        if moved <= 1e-5 * scale:
            break
    return scale, shift, explained


@njit(cache=True, nogil=True, error_model="numpy")
def fit_scale_and_shift(values, weights, book, rule):  # type: ignore[no-untyped-def]
    """Return (scale, shift) so that scale * book + shift suits the column.

    values, weights: [n] float32; what has no weight is left out.  book: [entries] float32,
    ascending.  rule: FITTED, least weighted squared error; RANGE, the book's ends on the smallest
    and largest value; ABSMAX, the book's largest magnitude on the values' largest, no shift.
    """
    low, high = np.inf, -np.inf
    for index in range(len(values)):
        if weights[index] > 0.0:
            low, high = min(low, values[index]), max(high, values[index])
    if low > high:
        return 0.0, 0.0
    if rule == ABSMAX:
        return max(abs(low), abs(high)) / max(abs(book[0]), abs(book[-1])), 0.0
    if high == low:
        return 0.0, low
    if rule == RANGE:
        scale = (high - low) / (book[-1] - book[0])
        return scale, low - scale * book[0]
    mass, moment, middle, _ = bin_values(values, weights, len(book))
    means = np.empty(len(mass) - 1)
    total, square = 0.0, 0.0
    for point in range(len(means)):
        size, rise = mass[point + 1] - mass[point], moment[point + 1] - moment[point]
        means[point] = rise / size
        square += rise * rise / size
        total += size
    mean = moment[-1] / total
    deviation = np.sqrt(max(square / total - mean * mean, 0.0))
    if book[0] == book[-1]:  # learned from columns that are all constant
        return 0.0, mean + middle
    # a shared codebook is learned from columns of mean 0 and deviation 1
    scale, shift, top = deviation, mean, -1.0
    for start in STARTS:
        new_scale, new_shift, explained = _fit(mass, moment, means, book, start * deviation, mean)
        if explained > top:
            scale, shift, top = new_scale, new_shift, explained
    return scale, shift + middle
