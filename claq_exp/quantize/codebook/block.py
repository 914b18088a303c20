"""The column loop inside a block of columns, compiled: compensate, reserve, fit, code, pass on.

All of it runs without Python and without its lock, so that linears of a group are solved side by
side.  Compiled by numba and cached on disk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, uintp
from numpy.typing import NDArray

from claq_exp.quantize.codebook.affine import fit_scale_and_shift
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.codebook.exact import fit_levels_exact, fit_quantiles
from claq_exp.quantize.codebook.fused import multiply_add
from claq_exp.quantize.number_formats.compiled import place_of

KMEANS, EXACT, QUANTILES, FITTED, RANGE, ABSMAX = range(6)
SHARED = FITTED  # this rule and those after it stretch a shared codebook
HALF_MAX = np.float32(65504.0)
HALF_OVERFLOW = np.float32(65520.0)  # midway to the next step


class ColumnTask(NamedTuple):
    """What the loop reads.

    bits: [in] uint8.  offsets: [in + 1] int64, where a column's reserved entries go.
    tails: reserve from both ends of a column in equal number instead of by magnitude.
    fit_reserved: reserved entries take part in the fit.
    rule: KMEANS ... ABSMAX.  books: [9, 256] float32, shared codebooks by width.
    weights: [out] float32, importance of the rows.
    row_scales: [out] float32; what a row's values are divided by before the fit.
    """

    bits: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    tails: bool
    fit_reserved: bool
    rule: int
    books: NDArray[np.float32]
    weights: NDArray[np.float32]
    row_scales: NDArray[np.float32]


class ColumnResult(NamedTuple):
    """What the loop writes, each column once.

    codes: [in, out] uint8.  levels: [in, 2**widest] float32 of float16 values, of columns with a
    codebook of their own.  scales: [in, 2] float32 of float16 values, of shared codebooks.
    rows: [reserved] int64.  kept: [reserved] float32 of float16 values; infinite beyond them.
    """

    codes: NDArray[np.uint8]
    levels: NDArray[np.float32]
    scales: NDArray[np.float32]
    rows: NDArray[np.int64]
    kept: NDArray[np.float32]


@njit(cache=True, nogil=True, error_model="numpy")
def round_half(value):  # type: ignore[no-untyped-def]
    """Return a float32 rounded to the nearest float16 (ties to even), infinite beyond its range."""
    magnitude = abs(value)
    if magnitude >= HALF_OVERFLOW:
        rounded = np.float32(np.inf)
    elif magnitude < np.float32(2.0**-14):  # subnormal: steps of 2**-24, the ulp of 0.5 to 1
        rounded = (magnitude + np.float32(0.75)) - np.float32(0.75)
    else:
        stretched = magnitude * np.float32(8193.0)  # 2**13 + 1 leaves 11 significant bits
        rounded = stretched - (stretched - magnitude)
    return np.copysign(rounded, value)


@njit(cache=True, nogil=True, error_model="numpy")
def compensate(values, lower, position):  # type: ignore[no-untyped-def]
    """Subtract from row `position` the errors in the rows before it, lower[position, k] each."""
    column = values[position]
    done = 0
    while done + 4 <= position:
        first, second = -lower[position, done], -lower[position, done + 1]
        third, fourth = -lower[position, done + 2], -lower[position, done + 3]
        for row in range(len(column)):
            left = multiply_add(first, values[done, row], column[row])
            left = multiply_add(second, values[done + 1, row], left)
            left = multiply_add(third, values[done + 2, row], left)
            column[row] = multiply_add(fourth, values[done + 3, row], left)
        done += 4
    for earlier in range(done, position):
        factor = -lower[position, earlier]
        for row in range(len(column)):
            column[row] = multiply_add(factor, values[earlier, row], column[row])


@njit(cache=True, nogil=True, error_model="numpy")
def _mark_largest(words, count, chosen):  # type: ignore[no-untyped-def]
    """Mark the rows of the `count` largest words, ties from the lowest row: bisection on counts."""
    low, high = np.int64(words[0]), np.int64(words[0])
    for word in words:
        low, high = min(low, np.int64(word)), max(high, np.int64(word))
    high += 1
    exactly = False
    while high - low > 1 and not exactly:  # at least `count` words reach low
        middle = (low + high) // 2
        bound = np.int32(middle)
        reached = np.int32(0)
        for word in words:
            reached += word >= bound
        exactly = reached == count
        if reached >= count:
            low = middle
        else:
            high = middle
    bound = np.int32(low)
    left = count
    for row in range(len(words)):
        if words[row] > bound:
            chosen[row] = True
            left -= 1
    for row in range(len(words)):
        if left > 0 and words[row] == bound and not chosen[row]:
            chosen[row] = True
            left -= 1


@njit(cache=True, nogil=True, error_model="numpy")
def choose_reserved(values, count, tails, chosen):  # type: ignore[no-untyped-def]
    """Mark the rows to keep: [out] float32 -> [out] bool, overwritten.

    The `count` largest magnitudes; with `tails` the count/2 largest values, rounded up, and the
    count/2 smallest.  Ties go to the lower row.
    """
    chosen[:] = False
    if count == 0:
        return
    words = np.empty(len(values), dtype=np.int32)
    bits = values.view(np.int32)
    for row in range(len(values)):  # the words of floats without sign are in their order
        words[row] = bits[row] & np.int32(0x7FFFFFFF)
    if not tails:
        _mark_largest(words, count, chosen)
        return
    for row in range(len(values)):
        words[row] = -words[row] if bits[row] < 0 else words[row]
    _mark_largest(words, (count + 1) // 2, chosen)
    if count // 2:
        for row in range(len(values)):
            words[row] = np.int32(-(1 << 31)) if chosen[row] else -words[row]
        _mark_largest(words, count // 2, chosen)


@njit(cache=True, nogil=True, error_model="numpy")
def assign_codes(values, levels, codes):  # type: ignore[no-untyped-def]
    """Write the index of the nearest level (the lower one on a tie) of each value.

    values: [n] float32.  levels: [k] float32, ascending.  codes: [n] uint8, overwritten.
    """
    half = np.float32(0.5)
    codes[:] = 0
    level = 0
    while level + 3 < len(levels):  # three borders a pass over the values
        first = half * (levels[level] + levels[level + 1])
        second = half * (levels[level + 1] + levels[level + 2])
        third = half * (levels[level + 2] + levels[level + 3])
        for index in range(len(values)):
            value = values[index]
            codes[index] += (
                np.uint8(value > first) + np.uint8(value > second) + np.uint8(value > third)
            )
        level += 3
    for last in range(level, len(levels) - 1):
        border = half * (levels[last] + levels[last + 1])
        for index in range(len(values)):
            codes[index] += np.uint8(values[index] > border)


@njit(cache=True, nogil=True, error_model="numpy")
def find_levels(values, weights, rule, book, levels):  # type: ignore[no-untyped-def]
    """Write the levels of one column, float16 values, ascending; return its (scale, shift).

    values, weights: [out] float32; what has no weight does not count.  rule: KMEANS ... ABSMAX.
    book, levels: [entries] float32; the book is read, and scale and shift mean something, where the
    rule stretches a shared codebook.
    """
    if rule >= SHARED:
        scale, shift = fit_scale_and_shift(values, weights, book, rule - SHARED)
        scale, shift = round_half(np.float32(scale)), round_half(np.float32(shift))
        for entry in range(len(levels)):
            levels[entry] = scale * book[entry]
            levels[entry] += shift
        return scale, shift
    centroids = np.empty(len(levels))
    if rule == EXACT:
        fit_levels_exact(values, weights, centroids)
    elif rule == QUANTILES:
        fit_quantiles(values, weights, centroids)
    else:
        fit_levels(values, weights, centroids)
    for entry in range(len(levels)):
        levels[entry] = round_half(np.float32(centroids[entry]))
    return np.float32(1.0), np.float32(0.0)


@njit(cache=True, nogil=True, error_model="numpy")
def quantize_block(values, lower, columns, task, result):  # type: ignore[no-untyped-def]
    """Quantize the columns of a block one after the other.

    values: [block, out] float32, a column of the weight per row; overwritten by the errors
        (w - q) / U_jj, which the caller spreads over later columns.
    lower: [block, block] float32, the inverse factor's block, transposed; a 0 x 0 array where
        errors are not compensated (they are then w - q).
    columns: [block] int64, each row's column of the matrix.
    """
    rows = values.shape[1]
    chosen = np.empty(rows, dtype=np.bool_)
    unreserved, scaled = np.empty(rows, dtype=np.float32), np.empty(rows, dtype=np.float32)
    for position in range(len(columns)):
        if len(lower):
            compensate(values, lower, position)
        column, current = columns[position], values[position]
        for row in range(rows):
            scaled[row] = current[row] / task.row_scales[row]
        start, stop = task.offsets[column], task.offsets[column + 1]
        choose_reserved(scaled, stop - start, task.tails, chosen)
        weights = task.weights
        if stop > start and not task.fit_reserved:
            weights = unreserved
            for row in range(rows):
                weights[row] = np.float32(0.0) if chosen[row] else task.weights[row]
        width = np.int64(task.bits[column])
        entries = 1 << width
        levels = np.empty(entries, dtype=np.float32)
        scale, shift = find_levels(scaled, weights, task.rule, task.books[width, :entries], levels)
        if task.rule >= SHARED:
            result.scales[column, 0], result.scales[column, 1] = scale, shift
        else:
            result.levels[column, :entries] = levels
        codes = result.codes[column]
        assign_codes(scaled, levels, codes)
        divisor = lower[position, position] if len(lower) else np.float32(1.0)
        if stop > start:
            _reserve(current, chosen, start, codes, result)
        for row in range(rows):
            kept = levels[uintp(codes[row])] * task.row_scales[row]
            kept = min(max(kept, -HALF_MAX), HALF_MAX)
            scaled[row] = round_half(current[row]) if chosen[row] else kept
        for row in range(rows):
            current[row] = (current[row] - scaled[row]) / divisor


@njit(cache=True, nogil=True, error_model="numpy")
def _reserve(values, chosen, place, codes, result):  # type: ignore[no-untyped-def]
    """Write the chosen rows of a column from `place` on, and give them code 0."""
    for row in range(len(values)):
        if chosen[row]:
            codes[row] = 0
            result.rows[place], result.kept[place] = row, round_half(values[row])
            place += 1


@njit(cache=True, nogil=True, error_model="numpy")
def quantize_block_on_grid(values, lower, task, codes):  # type: ignore[no-untyped-def]
    """Quantize the columns of a block to given grids: values and lower as in `quantize_block`.

    task: columns [block] int64, their groups [block] int64, scales and zeros [groups, out] float32,
        the highest code.
    codes: [in, out] uint8, overwritten where the columns are.
    """
    columns, groups, scales, zeros, top = task
    for position in range(len(columns)):
        if len(lower):
            compensate(values, lower, position)
        divisor = lower[position, position] if len(lower) else np.float32(1.0)
        current, written = values[position], codes[columns[position]]
        scale, zero = scales[groups[position]], zeros[groups[position]]
        for row in range(len(current)):
            code = np.rint(current[row] / scale[row]) + zero[row]
            code = min(max(code, np.float32(0.0)), top)
            kept = min(max(scale[row] * (code - zero[row]), -HALF_MAX), HALF_MAX)
            written[row] = np.uint8(code)
            current[row] = (current[row] - kept) / divisor


@njit(cache=True, nogil=True, error_model="numpy")
def quantize_block_in_format(values, lower, columns, task, codes):  # type: ignore[no-untyped-def]
    """Quantize the columns of a block in a block format whose scales and codebooks are chosen.

    values, lower, columns: as in `quantize_block`.
    task: codes [places, codebooks] uint8, codewords [places, codebooks] float32, resolution and
        offset of a lookup table (`claq_exp.quantize.number_formats.table`); steps [arrays, out]
        float32 and the columns' arrays [block] int64; selectors [blocks, out] uint8 and the
        columns' blocks [block] int64.
    codes: [in, out] uint8, overwritten where the columns are.
    """
    table, words, resolution, offset, steps, arrays, selectors, blocks = task
    for position in range(len(columns)):
        if len(lower):
            compensate(values, lower, position)
        divisor = lower[position, position] if len(lower) else np.float32(1.0)
        current, written = values[position], codes[columns[position]]
        step, book = steps[arrays[position]], selectors[blocks[position]]
        for row in range(len(current)):
            scaled = np.float32(0.0)
            if step[row] > np.float32(0.0):
                scaled = current[row] / step[row]
            place = uintp(place_of(scaled, resolution, offset))
            kept = words[place, uintp(book[row])] * step[row]
            kept = min(max(kept, -HALF_MAX), HALF_MAX)
            written[row] = table[place, uintp(book[row])]
            current[row] = (current[row] - kept) / divisor


@njit(cache=True, nogil=True, error_model="numpy")
def column_distortions(values, importance, options, rule, books):  # type: ignore[no-untyped-def]
    """Return the weighted squared error of columns at given widths and reserved counts.

    values: [columns, out] float32.  importance: [out] float32.  books: [9, 256] float32, by width.
    options: [options, 2] int64, width and reserved count, the largest magnitudes; those of one
        count next to each other.
    Returns [columns, options] float64.
    """
    rows = values.shape[1]
    chosen, codes = np.empty(rows, dtype=np.bool_), np.empty(rows, dtype=np.uint8)
    weights, levels = np.empty(rows, dtype=np.float32), np.empty(256, dtype=np.float32)
    found = np.empty((len(values), len(options)))
    for column in range(len(values)):
        count = np.int64(-1)
        for option in range(len(options)):
            if options[option, 1] != count:
                count = options[option, 1]
                choose_reserved(values[column], count, False, chosen)
                for row in range(rows):
                    weights[row] = np.float32(0.0) if chosen[row] else importance[row]
            width = options[option, 0]
            entries = 1 << width
            book = books[width, :entries]
            find_levels(values[column], weights, rule, book, levels[:entries])
            assign_codes(values[column], levels[:entries], codes)
            error = 0.0
            for row in range(rows):
                miss = values[column, row] - levels[codes[row]]
                error += weights[row] * miss * miss
            found[column, option] = error
    return found
