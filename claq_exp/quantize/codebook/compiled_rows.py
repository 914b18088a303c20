"""What codebooks of rows do, compiled: fit the levels of every row, code a column on them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, uintp
from numpy.typing import NDArray

from claq_exp.quantize.codebook.basics import choose_reserved
from claq_exp.quantize.codebook.compiled import codes, find_levels, keep_reserved, mark_placed


class RowTask(NamedTuple):
    """Columns on levels that each row has for itself, and that are fitted before.

    levels: [2**width, out] float32 of float16 values, ascending.  borders: [2**width - 1, out]
    float32, midway between them.
    offsets: [in + 1] int64, where a column's reserved entries go.  tails, placed: as of ColumnTask.

    codes: [in, out] uint8, written.  rows: [reserved] int64 and kept: [reserved] float32, written,
    as of ColumnTask.
    """

    levels: NDArray[np.float32]
    borders: NDArray[np.float32]
    offsets: NDArray[np.int64]
    tails: bool
    placed: bool
    codes: NDArray[np.uint8]
    rows: NDArray[np.int64]
    kept: NDArray[np.float32]


@codes(RowTask)
@njit(cache=True, nogil=True, error_model="numpy")
def code_by_row(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Reserve entries of a column and code it on the levels of rows, see `code_column`."""
    written = task.codes[column]
    written[:] = 0
    for entry in range(len(task.borders)):
        border = task.borders[entry]
        for row in range(len(values)):
            written[row] += np.uint8(values[row] > border[row])
    for row in range(len(values)):
        quantized[row] = task.levels[uintp(written[row]), uintp(row)]
    start, stop = task.offsets[column], task.offsets[column + 1]
    if stop > start:
        chosen = np.empty(len(values), dtype=np.bool_)
        if task.placed:
            mark_placed(task.rows[start:stop], chosen)
        else:
            choose_reserved(values, stop - start, task.tails, chosen)
        keep_reserved(values, chosen, start, written, task)
        for place in range(start, stop):
            quantized[task.rows[place]] = task.kept[place]


@njit(cache=True, nogil=True, error_model="numpy")
def fit_rows(weight, weights, left_out, rule, levels):  # type: ignore[no-untyped-def]
    """Write the levels of each row, float16 values, ascending.

    weight: [out, in] float32.  weights: [in] float32, of the columns.  left_out: [out, in] bool.
    rule: KMEANS or EXACT.  levels: [out, entries] float32, overwritten.
    """
    own, level_set = np.empty_like(weights), np.empty(0, dtype=np.float32)
    for row in range(len(weight)):
        for column in range(len(own)):
            own[column] = np.float32(0.0) if left_out[row, column] else weights[column]
        find_levels(weight[row], own, rule, levels[row], level_set, levels[row])
