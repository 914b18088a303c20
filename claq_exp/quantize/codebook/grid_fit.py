"""Scale and zero of a uniform grid for each group of a row, by least squares.

A grid w = s (q - z) of codes 0 to top lowers sum_j h_j (w_j - s (q_j - z))^2.  For a given scale
the best zero is found exactly, as a code or as any number (NeUQI, arXiv 2505.17595); scales are
sought from coarse to fine.  Compiled by numba and cached on disk.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from claq_exp.quantize.codebook.basics import round_half

SHRINK = 0.92  # from a scale that is tried to the next
LARGEST = SHRINK**-1  # over the scale that spans the group
SMALLEST = 0.2
HOPELESS = 2.0  # times the least error: smaller scales are no longer tried
FINER = 3  # times that the step between scales is halved
LEAST_SCALE = np.float32(2.0**-14)  # the least normal float16
FLATTEST = np.float32(2.0**-10)  # a scale over the group's peak, so that zeros fit float16


@njit(cache=True, nogil=True, error_model="numpy")
def best_zero(scaled, weights, top):  # type: ignore[no-untyped-def]
    """Return (zero, error) of the best real zero of a grid with steps of 1.

    scaled: [n] float64, w / s.  weights: [n] float64, positive.  top: the highest code.
    The error sum h (x + z - q)^2, q the code nearest to x + z, is a parabola in z wherever no code
    changes, and each parabola lies above it: so the least value of all parabolas is its minimum.  A
    grid may be moved by a whole step as long as it leaves a code at one end unused, which bounds
    the zeros that need be looked at; codes change in the same order in each unit of z.
    """
    count = len(scaled)
    low, high = scaled.min(), scaled.max()
    first, last = min(top - 0.5 - high, -0.5 - low), 0.5 - low
    codes, change, after = np.empty(count), np.empty(count), np.empty(count)
    total, sums, squares = 0.0, 0.0, 0.0
    for index in range(count):
        codes[index] = min(max(np.ceil(scaled[index] + first - 0.5), 0.0), top)
        move = codes[index] + 0.5 - scaled[index] - first  # of z, until the code changes
        after[index] = np.floor(move)
        change[index] = move - after[index]
        miss = codes[index] - scaled[index]
        total += weights[index]
        sums += weights[index] * miss
        squares += weights[index] * miss * miss
    best, zero = squares - sums * sums / total, sums / total
    order = np.argsort(change)
    for unit in range(int(np.ceil(last - first)) + 1):
        for index in order:
            if after[index] > unit or codes[index] >= top:
                continue
            miss = codes[index] - scaled[index]
            codes[index] += 1.0
            sums += weights[index]
            squares += weights[index] * (2.0 * miss + 1.0)
            error = squares - sums * sums / total
            if error < best:
                best, zero = error, sums / total
    return zero, max(best, 0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def grid_error(scaled, weights, zero, top):  # type: ignore[no-untyped-def]
    """Return sum h (x + z - q)^2, q the code nearest to x + z; the rest as of `best_zero`."""
    error = 0.0
    for index in range(len(scaled)):
        place = scaled[index] + zero
        miss = place - min(max(np.rint(place), 0.0), top)
        error += weights[index] * miss * miss
    return error


@njit(cache=True, nogil=True, error_model="numpy")
def best_whole_zero(scaled, weights, top):  # type: ignore[no-untyped-def]
    """Return (zero, error) of the best zero that is a code; as of `best_zero`."""
    low, high = scaled.min(), scaled.max()
    first = min(max(np.floor(min(top - 0.5 - high, -0.5 - low)), 0.0), top)
    last = min(max(np.ceil(0.5 - low), first), top)
    best, zero = np.inf, first
    for tried in range(int(first), int(last) + 1):
        error = grid_error(scaled, weights, float(tried), top)
        if error < best:
            best, zero = error, float(tried)
    return zero, best


@njit(cache=True, nogil=True, error_model="numpy")
def fit_at(values, weights, scale, top, real):  # type: ignore[no-untyped-def]
    """Return (error, zero) of a group at a scale, in units of the weights, the zero as stored.

    values: [n] float64.  weights: [n] float64, positive.
    """
    scaled = values / scale
    if real:
        zero = np.float64(round_half(np.float32(best_zero(scaled, weights, top)[0])))
        error = grid_error(scaled, weights, zero, top)
    else:
        zero, error = best_whole_zero(scaled, weights, top)
    return error * scale * scale, zero


@njit(cache=True, nogil=True, error_model="numpy")
def best_grid(values, weights, scale, zero, top, real, search):  # type: ignore[no-untyped-def]
    """Return (scale, zero), float16 values, of the best grid of a group, or the one that is given.

    values, weights: [n] float64, weights positive.  scale, zero: the grid to beat, float64.
    real: the zero is any number, else a code.  search: try other scales.
    """
    best = grid_error(values / scale, weights, zero, top) * scale * scale
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    if real:
        low, high = values.min(), values.max()
    peak = max(abs(low), abs(high))
    if peak == 0.0:
        return scale, zero
    spans = max((high - low) / top, peak * FLATTEST) if search else scale
    factor, least, middle = LARGEST if search else 1.0, np.inf, 1.0
    while factor >= SMALLEST:
        error, tried, stored = _try(values, weights, factor * spans, top, real)
        if error < best:
            best, scale, zero = error, stored, tried
        if error < least:
            least, middle = error, factor
        if not search or error > HOPELESS * least:
            break
        factor *= SHRINK
    step = SHRINK
    for _ in range(FINER if search else 0):
        step = np.sqrt(step)
        around = middle
        for factor in (around * step, around / step):
            error, tried, stored = _try(values, weights, factor * spans, top, real)
            if error < best:
                best, scale, zero = error, stored, tried
            if error < least:
                least, middle = error, factor
    return scale, zero


@njit(cache=True, nogil=True, error_model="numpy")
def _try(values, weights, scale, top, real):  # type: ignore[no-untyped-def]
    """Return (error, zero, scale as it is stored) at a scale."""
    stored = np.float64(max(round_half(np.float32(scale)), LEAST_SCALE))
    error, zero = fit_at(values, weights, stored, top, real)
    return error, zero, stored


@njit(cache=True, nogil=True, error_model="numpy")
def fit_grids(weight, importance, size, top, real, search, scales, zeros):  # type: ignore[no-untyped-def]
    """Write the best grid of every row and group where it is better than the one that is there.

    weight: [out, in] float32.  importance: [in] float32.  size: columns of a group.
    scales, zeros: [out, groups] float32, read and overwritten by float16 values.
    """
    columns = weight.shape[1]
    values, weights = np.empty(size), np.empty(size)
    for row in range(len(weight)):
        for group in range(scales.shape[1]):
            count = 0
            for column in range(group * size, min((group + 1) * size, columns)):
                if importance[column] > 0:
                    values[count], weights[count] = weight[row, column], importance[column]
                    count += 1
            if count:
                scales[row, group], zeros[row, group] = best_grid(
                    values[:count],
                    weights[:count],
                    np.float64(scales[row, group]),
                    np.float64(zeros[row, group]),
                    top,
                    real,
                    search,
                )
