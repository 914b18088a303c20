"""Stretches a given codebook to a column: the scale and shift of least squared error."""

from __future__ import annotations

import numpy as np
from numba import njit

from claq_exp.quantize.codebook.clustering import bin_values

ITERATIONS = 8
FITTED, RANGE, ABSMAX = range(3)


@njit(cache=True, nogil=True)
def _fit(mass, moment, book, scale, shift):  # type: ignore[no-untyped-def]
    """Alternate nearest levels and least squares, as Lloyd does, over the points of `bin_values`.

    book: [entries] float32, ascending.  Each step lowers the squared error or leaves it.
    """
    points = len(mass) - 1
    for _ in range(ITERATIONS):
        ones = by_book = by_square = values = products = 0.0
        point = 0
        for entry in range(len(book)):
            start = point
            if entry + 1 < len(book):
                middle = shift + scale * 0.5 * (book[entry] + book[entry + 1])
                while point < points and (
                    moment[point + 1] - moment[point] <= middle * (mass[point + 1] - mass[point])
                ):
                    point += 1
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
        if moved <= 1e-5 * scale:
            break
    return scale, shift


@njit(cache=True, nogil=True)
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
    scale = (high - low) / (book[-1] - book[0])
    if rule == RANGE:
        return scale, low - scale * book[0]
    mass, moment, middle = bin_values(values, weights, len(book))
    total, square = 0.0, 0.0
    for point in range(len(mass) - 1):
        size, rise = mass[point + 1] - mass[point], moment[point + 1] - moment[point]
        square += rise * rise / size
        total += size
    mean = moment[-1] / total
    deviation = np.sqrt(max(square / total - mean * mean, 0.0))
    centre, width = 0.0, 0.0
    for level in book:
        centre += level / len(book)
    for level in book:
        width += (level - centre) * (level - centre) / len(book)
    start = deviation / np.sqrt(width)
    scale, shift = _fit(mass, moment, book, start, mean - start * centre)
    return scale, shift + middle
