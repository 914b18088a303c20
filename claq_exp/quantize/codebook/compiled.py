"""What codebooks do to one column, compiled: reserve, fit, code.

A loop over columns is a solver's; one that is compiled itself calls `code_column`, and is compiled
together with the function of the codebook's task.  Compiled by numba and cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types, uintp
from numba.extending import overload
from numpy.typing import NDArray

from claq_exp.number_formats.compiled import place_of
from claq_exp.quantize.codebook.affine import fit_scale_and_shift
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.codebook.exact import fit_levels_exact, fit_quantiles

KMEANS, EXACT, QUANTILES, FITTED, RANGE, ABSMAX = range(6)
SHARED = FITTED  # this rule and those after it stretch a shared codebook
HALF_MAX = np.float32(65504.0)
HALF_OVERFLOW = np.float32(65520.0)  # midway to the next step


class ColumnTask(NamedTuple):
    """Columns on levels that are fitted to each: what a step reads, and what it writes.

    bits: [in] uint8.  offsets: [in + 1] int64, where a column's reserved entries go.
    tails: reserve from both ends of a column in equal number instead of by magnitude.
    fit_reserved: reserved entries take part in the fit.
    rule: KMEANS ... ABSMAX.  books: [9, 256] float32, shared codebooks by width.
    weights: [out] float32, importance of the rows.
    row_scales: [out] float32; what a row's values are divided by before the fit.

    codes: [in, out] uint8.  levels: [in, 2**widest] float32 of float16 values, of columns with a
    codebook of their own.  scales: [in, 2] float32 of float16 values, of shared codebooks.
    rows: [reserved] int64.  kept: [reserved] float32 of float16 values; infinite beyond them.
    """

    bits: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    tails: bool
    fit_reserved: bool
    rule: int
    books: NDArray[np.float32]
    weights: NDArray[np.float32]
    row_scales: NDArray[np.float32]
    codes: NDArray[np.uint8]
    levels: NDArray[np.float32]
    scales: NDArray[np.float32]
    rows: NDArray[np.int64]
    kept: NDArray[np.float32]


class GridTask(NamedTuple):
    """Columns on grids that are fixed before.

    codes: [in, out] uint8, written.  scales, zeros: [groups, out] float32.  group_size: columns
    that share a grid.  top: the highest code.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32]
    group_size: int
    top: np.float32


class RealGridTask(NamedTuple):
    """As `GridTask`, with zeros that are no codes."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32]
    group_size: int
    top: np.float32


class FormatTask(NamedTuple):
    """Columns in a block format whose scales and codebooks are chosen.

    codes: [in, out] uint8, written.
    table: [places, codebooks] uint8, words: [places, codebooks] float32, resolution and offset: of
    a lookup table (`claq_exp.number_formats.table`).
    steps: [arrays, out] float32, for each `array` columns.
    selectors: [blocks, out] uint8, for each `block` columns.
    """

    codes: NDArray[np.uint8]
    table: NDArray[np.uint8]
    words: NDArray[np.float32]
    resolution: np.float32
    offset: int
    steps: NDArray[np.float32]
    array: int
    selectors: NDArray[np.uint8]
    block: int


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


def code_column(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Fit and code a column, in compiled loops: the function that `codes` knows for the task.

    values: [out] float32, the column as it is now.  column: its place in the matrix.
    quantized: [out] float32, overwritten by what is stored of it.
    """
    raise NotImplementedError("only compiled functions call this")


def codes(kind: type[tuple[Any, ...]]) -> Callable[[Any], Any]:
    """Have a compiled function be `code_column` for tasks of a NamedTuple class."""

    def register(step: Any) -> Any:
        @overload(code_column)
        def choose(values, column, task, quantized):  # type: ignore[no-untyped-def]
            if not (isinstance(task, types.NamedTuple) and task.instance_class is kind):
                return None

            def call(values, column, task, quantized):  # type: ignore[no-untyped-def]
                step(values, column, task, quantized)

            return call

        return step

    return register


@codes(ColumnTask)
@njit(cache=True, nogil=True, error_model="numpy")
def code_with_levels(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Reserve entries of a column, fit its levels and code it, see `code_column`."""
    rows = len(values)
    chosen = np.empty(rows, dtype=np.bool_)
    for row in range(rows):
        quantized[row] = values[row] / task.row_scales[row]
    start, stop = task.offsets[column], task.offsets[column + 1]
    choose_reserved(quantized, stop - start, task.tails, chosen)
    weights = task.weights
    if stop > start and not task.fit_reserved:
        weights = np.empty(rows, dtype=np.float32)
        for row in range(rows):
            weights[row] = np.float32(0.0) if chosen[row] else task.weights[row]
    width = np.int64(task.bits[column])
    entries = 1 << width
    levels = np.empty(entries, dtype=np.float32)
    scale, shift = find_levels(quantized, weights, task.rule, task.books[width, :entries], levels)
    if task.rule >= SHARED:
        task.scales[column, 0], task.scales[column, 1] = scale, shift
    else:
        task.levels[column, :entries] = levels
    written = task.codes[column]
    assign_codes(quantized, levels, written)
    if stop > start:
        keep_reserved(values, chosen, start, written, task)
    for row in range(rows):
        kept = levels[uintp(written[row])] * task.row_scales[row]
        kept = min(max(kept, -HALF_MAX), HALF_MAX)
        quantized[row] = round_half(values[row]) if chosen[row] else kept


@njit(cache=True, nogil=True, error_model="numpy")
def keep_reserved(values, chosen, place, codes, task):  # type: ignore[no-untyped-def]
    """Write the chosen rows of a column from `place` on, and give them code 0."""
    for row in range(len(values)):
        if chosen[row]:
            codes[row] = 0
            task.rows[place], task.kept[place] = row, round_half(values[row])
            place += 1


@codes(GridTask)
@njit(cache=True, nogil=True, error_model="numpy")
def code_on_grid(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Code a column on a given grid, see `code_column`."""
    group, written = column // task.group_size, task.codes[column]
    scale, zero = task.scales[group], task.zeros[group]
    for row in range(len(values)):
        code = np.rint(values[row] / scale[row]) + zero[row]
        code = min(max(code, np.float32(0.0)), task.top)
        quantized[row] = min(max(scale[row] * (code - zero[row]), -HALF_MAX), HALF_MAX)
        written[row] = np.uint8(code)


@codes(RealGridTask)
@njit(cache=True, nogil=True, error_model="numpy")
def code_on_real_grid(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Code a column on a given grid whose zeros are no codes, see `code_column`."""
    group, written = column // task.group_size, task.codes[column]
    scale, zero = task.scales[group], task.zeros[group]
    for row in range(len(values)):
        code = min(max(np.rint(values[row] / scale[row] + zero[row]), np.float32(0.0)), task.top)
        quantized[row] = min(max(scale[row] * (code - zero[row]), -HALF_MAX), HALF_MAX)
        written[row] = np.uint8(code)


@codes(FormatTask)
@njit(cache=True, nogil=True, error_model="numpy")
def code_in_format(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Code a column in a block format whose scales and codebooks are chosen, see `code_column`."""
    written = task.codes[column]
    step, book = task.steps[column // task.array], task.selectors[column // task.block]
    for row in range(len(values)):
        scaled = np.float32(0.0)
        if step[row] > np.float32(0.0):
            scaled = values[row] / step[row]
        place = uintp(place_of(scaled, task.resolution, task.offset))
        kept = task.words[place, uintp(book[row])] * step[row]
        quantized[row] = min(max(kept, -HALF_MAX), HALF_MAX)
        written[row] = task.table[place, uintp(book[row])]


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
