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
from claq_exp.quantize.codebook.basics import (
    HALF_MAX,
    assign_codes,
    choose_reserved,
    round_half,
)
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.codebook.exact import fit_levels_exact, fit_quantiles
from claq_exp.quantize.codebook.snap import snap_levels

KMEANS, EXACT, QUANTILES, FITTED, RANGE, ABSMAX = range(6)
SETTLED = -1  # levels are there already
SHARED = FITTED  # this rule and those after it stretch a shared codebook


class ColumnTask(NamedTuple):
    """Columns on levels that are fitted to each: what a step reads, and what it writes.

    bits: [in] uint8.  offsets: [in + 1] int64, where a column's reserved entries go.
    tails: reserve from both ends of a column in equal number instead of by magnitude.
    fit_reserved: reserved entries take part in the fit.
    placed: reserved entries stay in the rows that they have.
    rule: KMEANS ... ABSMAX, or SETTLED.  books: [9, 256] float32, shared codebooks by width.
    weights: [out] float32, importance of the rows.  shares: [groups, in] float32, what that is
    multiplied by in a column for each group of neighbouring rows; [0, in] for all alike.
    row_scales: [out] float32; what a row's values are divided by before the fit.
    level_set: [any] float32, ascending from -1 to 1, what levels over their column's scale may be;
        empty where they may be any float16.

    codes: [in, out] uint8.  levels: [in, 2**widest] float32, of columns with a codebook of their
    own.  scales: [in, 2] float32 of float16 values, scale and shift of shared codebooks, and the
    scale of those that are made of a level set.
    rows: [reserved] int64.  kept: [reserved] float32 of float16 values; infinite beyond them.
    """

    bits: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    tails: bool
    placed: bool
    fit_reserved: bool
    rule: int
    books: NDArray[np.float32]
    weights: NDArray[np.float32]
    shares: NDArray[np.float32]
    row_scales: NDArray[np.float32]
    level_set: NDArray[np.float32]
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
def stretch(book, scale, shift, levels):  # type: ignore[no-untyped-def]
    """Write scale * book + shift: all float32, a book of as many entries or more."""
    for entry in range(len(levels)):
        levels[entry] = scale * book[entry]
        levels[entry] += shift


@njit(cache=True, nogil=True, error_model="numpy")
def find_levels(values, weights, rule, book, level_set, levels):  # type: ignore[no-untyped-def]
    """Write the levels of one column, ascending; return its (scale, shift).

    values, weights: [out] float32; what has no weight does not count.  rule: KMEANS ... ABSMAX.
    book, levels: [entries] float32; the book is read, and scale and shift mean something, where the
    rule stretches a shared codebook.
    level_set: as of the task.  Levels are float16 values without one, and a float16 scale times
    those of the set with one.
    """
    if rule >= SHARED:
        scale, shift = fit_scale_and_shift(values, weights, book, rule - SHARED)
        scale, shift = round_half(np.float32(scale)), round_half(np.float32(shift))
        stretch(book, scale, shift, levels)
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
    if len(level_set):
        return snap_levels(values, weights, level_set, levels), np.float32(0.0)
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


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_weights(column, task, chosen):  # type: ignore[no-untyped-def]
    """Return what rows weigh in the fit of a column: [out] float32.  chosen: reserved rows."""
    leave_out = task.offsets[column + 1] > task.offsets[column] and not task.fit_reserved
    if not leave_out and not len(task.shares):
        return task.weights
    weights, rows = task.weights.copy(), len(task.weights)
    if len(task.shares):
        size = rows // len(task.shares)
        for row in range(rows):
            weights[row] *= task.shares[row // size, column]
    if leave_out:
        for row in range(rows):
            weights[row] = np.float32(0.0) if chosen[row] else weights[row]
    return weights


@codes(ColumnTask)
@njit(cache=True, nogil=True, error_model="numpy")
def code_with_levels(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Reserve entries of a column, fit its levels and code it, see `code_column`."""
    rows = len(values)
    chosen = np.empty(rows, dtype=np.bool_)
    for row in range(rows):
        quantized[row] = values[row] / task.row_scales[row]
    start, stop = task.offsets[column], task.offsets[column + 1]
    if task.placed:
        mark_placed(task.rows[start:stop], chosen)
    else:
        choose_reserved(quantized, stop - start, task.tails, chosen)
    weights = _fit_weights(column, task, chosen)
    width = np.int64(task.bits[column])
    entries = 1 << width
    levels = np.empty(entries, dtype=np.float32)
    if task.rule == SETTLED and task.levels.shape[1]:
        levels[:] = task.levels[column, :entries]
    elif task.rule == SETTLED:
        stretch(task.books[width], task.scales[column, 0], task.scales[column, 1], levels)
    else:
        book = task.books[width, :entries]
        scale, shift = find_levels(quantized, weights, task.rule, book, task.level_set, levels)
        if len(task.scales):
            task.scales[column, 0], task.scales[column, 1] = scale, shift
        if task.rule < SHARED:
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
def mark_placed(rows, chosen):  # type: ignore[no-untyped-def]
    """Mark the rows that are given: [n] int64 -> [out] bool, overwritten."""
    chosen[:] = False
    for row in rows:
        chosen[row] = True


@njit(cache=True, nogil=True, error_model="numpy")
def keep_reserved(values, chosen, place, codes, task):  # type: ignore[no-untyped-def]
    """Write the chosen rows of a column from `place` on, and give them code 0.

    task: with `rows` and `kept` as those of `ColumnTask`.
    """
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
def column_distortions(values, importance, options, rule, books, level_set):  # type: ignore[no-untyped-def]
    """Return the weighted squared error of columns at given widths and reserved counts.

    values: [columns, out] float32.  importance: [out] float32.  books: [9, 256] float32, by width.
    options: [options, 2] int64, width and reserved count, the largest magnitudes; those of one
        count next to each other.
    level_set: as of `ColumnTask`.
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
            find_levels(values[column], weights, rule, book, level_set, levels[:entries])
            assign_codes(values[column], levels[:entries], codes)
            error = 0.0
            for row in range(rows):
                miss = values[column, row] - levels[codes[row]]
                error += weights[row] * miss * miss
            found[column, option] = error
    return found
