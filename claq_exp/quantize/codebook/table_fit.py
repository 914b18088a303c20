"""A table of levels for a matrix, and a scale for each group of a row, by least squares.

Both lower sum_ij h_j (w_ij - s_ig t_c)^2 over the nearest codes c: the scales of a table by a
search over how far they may clip, the table of scales by a step of weighted k-means on w / s.
Compiled by numba and cached on disk.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uintp
from numpy.typing import NDArray

from claq_exp.payload.stored import HALF_MAX
from claq_exp.quantize.codebook.clustering import fit_levels

ROUNDS = 12  # of scales and table in turn, at most
SETTLED = 1e-4  # share of the loss by which a round must lower it
AGAIN = 2  # how often the best scale of a group is improved
CLIPS = np.array(
    [1.2, 1.08, 1, 0.93, 0.86, 0.79, 0.72, 0.65, 0.57, 0.48], dtype=np.float32
)  # scales that are tried, over a group's peak
LANES = 8  # sums side by side, in an order that the source fixes
NO_MASK = np.zeros((0, 0), dtype=np.bool_)


@njit(cache=True, nogil=True, error_model="numpy")
def nearest_levels(values, inverse, table, found):  # type: ignore[no-untyped-def]
    """Write the level nearest to each scaled value, the lower one on a tie.

    values: [n] float32.  table: [k] float32, ascending.  found: [n] float32, overwritten.
    """
    half = np.float32(0.5)
    found[:] = table[0]
    for level in range(len(table) - 1):
        border, above = half * (table[level] + table[level + 1]), table[level + 1]
        for index in range(len(values)):
            found[index] = above if values[index] * inverse > border else found[index]


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_at(values, weights, scale, table, found):  # type: ignore[no-untyped-def]
    """Return (gain, scale): of the codes at a scale, the best scale and what it explains.

    The gain is what is taken off sum h w^2.  found: [n] float32 scratch.
    """
    nearest_levels(values, np.float32(1.0) / scale, table, found)
    products, squares = np.zeros(LANES, dtype=np.float32), np.zeros(LANES, dtype=np.float32)
    whole = len(values) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            at = uintp(start + lane)
            weighed = weights[at] * found[at]
            products[lane] += weighed * values[at]
            squares[lane] += weighed * found[at]
    product, square = 0.0, 0.0
    for lane in range(LANES):
        product += products[lane]
        square += squares[lane]
    for index in range(whole, len(values)):
        weighed = weights[index] * found[index]
        product += weighed * values[index]
        square += weighed * found[index]
    if square <= 0.0:
        return 0.0, np.float32(0.0)
    best = min(max(product / square, -HALF_MAX), HALF_MAX)
    return best * (2.0 * product - best * square), np.float32(best)


@njit(cache=True, nogil=True, error_model="numpy")
def best_scale(values, weights, table, clips, start, found):  # type: ignore[no-untyped-def]
    """Return (gain, scale) of the best scale of one group, of either sign.

    values, weights: [n] float32; what has no weight does not count.  table: [k] float32, ascending.
    clips: [m] float32.  start: a scale that is tried too, unless it is 0.  found: [n] float32
    scratch.
    """
    peak = np.float32(0.0)
    for index in range(len(values)):
        if weights[index] > 0:
            peak = max(peak, abs(values[index]))
    reach = max(abs(table[0]), abs(table[-1]))
    gain, scale = 0.0, np.float32(0.0)
    if peak == 0 or reach == 0:
        return gain, scale
    tried = start
    for number in range(2 * len(clips) + 1):
        if number:
            clip = clips[(number - 1) // 2] / reach
            tried = peak * clip if number % 2 else -peak * clip
        if abs(tried) < np.float32(1e-30):
            continue
        new, fitted = _fit_at(values, weights, tried, table, found)
        if new > gain:
            gain, scale = new, fitted
    for _ in range(AGAIN):
        if abs(scale) < np.float32(1e-30):
            break
        new, fitted = _fit_at(values, weights, scale, table, found)
        if new <= gain:
            break
        gain, scale = new, fitted
    return gain, scale


@njit(cache=True, nogil=True, error_model="numpy")
def search_scales(weight, importance, left_out, table, size, clips, scales):  # type: ignore[no-untyped-def]
    """Write the best scale of every row and group; return the weighted squared error.

    weight: [out, in] float32.  importance: [in] float32.  left_out: [out, in] bool, entries that do
    not count; a 0 x 0 array where all do.  size: columns of a group.
    scales: [out, groups] float32, read as starts and overwritten.
    """
    rows, columns = weight.shape
    weights, found = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.float32)
    loss = 0.0
    for row in range(rows):
        for group in range(scales.shape[1]):
            first, last = group * size, min((group + 1) * size, columns)
            count = last - first
            values, energy = weight[row, first:last], 0.0
            for index in range(count):
                weights[index] = importance[first + index]
                if len(left_out) and left_out[row, first + index]:
                    weights[index] = np.float32(0.0)
                energy += np.float64(weights[index]) * values[index] * values[index]
            gain, scales[row, group] = best_scale(
                values, weights[:count], table, clips, scales[row, group], found[:count]
            )
            loss += energy - gain
    return loss


@njit(cache=True, nogil=True, error_model="numpy")
def round_scales(weight, importance, left_out, table, size, steps, top, integers):  # type: ignore[no-untyped-def]
    """Choose the integer of each row and group whose multiple of the row's step errs least.

    The nearest one and its neighbours are tried.  steps: [out] float32.  top: the largest integer.
    integers: [out, groups] float32, read as the nearest and overwritten.  The rest as of
    `search_scales`.
    """
    columns = weight.shape[1]
    weights, found = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.float32)
    for row in range(len(weight)):
        for group in range(integers.shape[1]):
            first, last = group * size, min((group + 1) * size, columns)
            count, values = last - first, weight[row, first:last]
            for index in range(count):
                out = len(left_out) and left_out[row, first + index]
                weights[index] = np.float32(0.0) if out else importance[first + index]
            near, least = integers[row, group], np.inf
            for move in (0, -1, 1):
                tried = min(max(near + np.float32(move), np.float32(-top - 1)), np.float32(top))
                scale = tried * steps[row]
                found[:count] = np.float32(0.0)
                if scale != 0:
                    nearest_levels(values, np.float32(1.0) / scale, table, found[:count])
                loss = 0.0
                for index in range(count):
                    miss = values[index] - scale * found[index]
                    loss += weights[index] * miss * miss
                if loss < least:
                    least, integers[row, group] = loss, tried


@njit(cache=True, nogil=True, error_model="numpy")
def round_to_table(weight, table, size, scales, rounded):  # type: ignore[no-untyped-def]
    """Write what the nearest codes stand for: [out, in] float32, overwritten.

    scales: [out, groups] float32.  The rest as of `search_scales`.
    """
    columns = weight.shape[1]
    for row in range(len(weight)):
        for group in range(scales.shape[1]):
            first, last = group * size, min((group + 1) * size, columns)
            scale, found = scales[row, group], rounded[row, first:last]
            found[:] = np.float32(0.0)
            if scale != 0:
                nearest_levels(weight[row, first:last], np.float32(1.0) / scale, table, found)
            for index in range(last - first):
                found[index] *= scale


@njit(cache=True, nogil=True, error_model="numpy")
def improve_table(weight, importance, rows, left_out, size, scales, table):  # type: ignore[no-untyped-def]
    """Move every level to the mean of the scaled entries that are nearest to it, in place.

    Weighted by h_j s^2 and `rows` [out] float32; a level without entries stays.  The rest as of
    `search_scales`.  table: [k] float32, ascending, as it is afterwards.
    """
    columns = weight.shape[1]
    found, codes = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.int64)
    mass, moment = np.zeros(len(table)), np.zeros(len(table))
    half = np.float32(0.5)
    for row in range(len(weight)):
        for group in range(scales.shape[1]):
            scale = scales[row, group]
            if abs(scale) < np.float32(1e-30):
                continue
            first, last = group * size, min((group + 1) * size, columns)
            inverse, count = np.float32(1.0) / scale, last - first
            codes[:] = 0
            for index in range(count):
                found[index] = weight[row, first + index] * inverse
            for level in range(len(table) - 1):
                border = half * (table[level] + table[level + 1])
                for index in range(count):
                    codes[index] += found[index] > border
            share = np.float64(rows[row]) * scale * scale
            for index in range(count):
                if len(left_out) and left_out[row, first + index]:
                    continue
                weighed = share * importance[first + index]
                mass[codes[index]] += weighed
                moment[codes[index]] += weighed * found[index]
    for level in range(len(table)):
        if mass[level] > 0:
            table[level] = np.float32(moment[level] / mass[level])


def learn_table(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    rows: NDArray[np.float32],
    left_out: NDArray[np.bool_],
    size: int,
    entries: int,
) -> NDArray[np.float32]:
    """Return a table for a matrix: [entries] float32, ascending, of magnitudes up to 1.

    weight, importance, left_out, size: as of `search_scales`.  rows: [out] float32, importance of
    the rows.  Starts from weighted k-means on entries over their group's peak, the sign of the
    peak taken off; then scales and table are improved in turn, which lowers the error or leaves it.
    """
    scales = _peaks(weight, importance, left_out, size)
    table = _first_table(weight, importance, rows, left_out, size, entries, scales)
    before = np.inf
    for _ in range(ROUNDS):
        loss = search_scales(weight, importance, left_out, table, size, CLIPS, scales)
        if loss >= before * (1 - SETTLED):
            break
        before = loss
        improve_table(weight, importance, rows, left_out, size, scales, table)
    top = np.abs(table).max()
    return table / top if top > 0 else table


def _peaks(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    left_out: NDArray[np.bool_],
    size: int,
) -> NDArray[np.float32]:
    """Return the entry of largest magnitude of each row and group: [out, groups] float32."""
    counted = np.broadcast_to(importance > 0, weight.shape)
    if len(left_out):
        counted = counted & ~left_out
    known = np.where(counted, weight, np.float32(0.0))
    peaks = []
    for first in range(0, weight.shape[1], size):
        part = known[:, first : first + size]
        places = np.abs(part).argmax(axis=1)
        peaks.append(part[np.arange(len(part)), places])
    return np.stack(peaks, axis=1)


def _first_table(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    rows: NDArray[np.float32],
    left_out: NDArray[np.bool_],
    size: int,
    entries: int,
    scales: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return weighted k-means of the entries over given scales: [entries] float32."""
    spread = np.repeat(scales, size, axis=1)[:, : weight.shape[1]]
    weights = importance[None, :] * rows[:, None] * spread * spread
    if len(left_out):
        weights = np.where(left_out, np.float32(0.0), weights)
    counted = weights > 0
    if not counted.any():
        return np.linspace(-1, 1, entries, dtype=np.float32)
    values = (weight[counted] / spread[counted]).astype(np.float32)
    centroids = np.empty(entries)
    fit_levels(values, weights[counted].astype(np.float32), centroids)
    return centroids.astype(np.float32)
