"""The column loop of solvers that compensate, compiled together with a codebook's own step.

All of it runs without Python and without its lock, so that linears of a group are solved side by
side.  Compiled by numba and cached on disk.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from claq_exp.quantize.codebook.compiled import code_column
from claq_exp.quantize.codebook.fused import multiply_add


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
def quantize_block(values, lower, columns, task, coded):  # type: ignore[no-untyped-def]
    """Quantize the columns of a block one after the other.

    values: [block, out] float32, a column of the weight per row; overwritten by the errors
        (w - q) / U_jj, which the caller spreads over later columns.
    lower: [block, block] float32, the inverse factor's block, transposed; a 0 x 0 array where
        errors are not compensated (they are then w - q).
    columns: [block] int64, each row's column of the matrix.
    task: of the codebook's quantizer; its type says which compiled step `code_column` is.
    coded: [block, out] float32, overwritten by the columns as they were coded; a 0 x 0 array where
        nobody asks.
    """
    quantized = np.empty(values.shape[1], dtype=np.float32)
    for position in range(len(columns)):
        if len(lower):
            compensate(values, lower, position)
        current = values[position]
        if len(coded):
            coded[position] = current
        code_column(current, columns[position], task, quantized)
        divisor = lower[position, position] if len(lower) else np.float32(1.0)
        for row in range(len(current)):
            current[row] = (current[row] - quantized[row]) / divisor


@njit(cache=True, nogil=True, error_model="numpy")
def quantize_block_of_groups(values, lower, columns, task, coded):  # type: ignore[no-untyped-def]
    """Do what `quantize_block` does, for groups of neighbouring rows in equal numbers.

    lower: [groups, block, block] float32, of each.
    One group has the other loop: numba does not know that the slice of all rows is contiguous.
    """
    quantized = np.empty(values.shape[1], dtype=np.float32)
    size = values.shape[1] // len(lower)
    for position in range(len(columns)):
        for group in range(len(lower)):
            compensate(values[:, group * size : (group + 1) * size], lower[group], position)
        current = values[position]
        if len(coded):
            coded[position] = current
        code_column(current, columns[position], task, quantized)
        for row in range(len(current)):
            divisor = lower[row // size, position, position]
            current[row] = (current[row] - quantized[row]) / divisor


@njit(cache=True, nogil=True, error_model="numpy")
def descend_block_of_groups(values, ratios, prices, columns, task, quantized, coded, weights):  # type: ignore[no-untyped-def]
    """Do what `descend_block` does, for groups of neighbouring rows in equal numbers.

    ratios: [groups, block, block] float32, of each.  prices: [groups, block] float32, H_pp of each.
    Returns by how much the loss of each column fell: [block].
    """
    gains = np.zeros(len(columns))
    found = np.empty(values.shape[1], dtype=np.float32)
    priced = np.empty(values.shape[1], dtype=np.float32)
    size = values.shape[1] // len(ratios)
    for position in range(len(columns)):
        for group in range(len(ratios)):
            compensate(values[:, group * size : (group + 1) * size], ratios[group], position)
        for row in range(len(weights)):
            priced[row] = weights[row] * prices[row // size, position]
        current, kept = values[position], quantized[position]
        code_column(current, columns[position], task, found)
        gain = closer(current, kept, found, priced)
        if gain >= 0.0:
            gains[position] = gain
            coded[position] = current
        else:
            code_column(coded[position], columns[position], task, found)
        for row in range(len(current)):
            current[row] = found[row] - kept[row]
            kept[row] = found[row]
    return gains


@njit(cache=True, nogil=True, error_model="numpy")
def descend_block(values, ratios, columns, task, quantized, coded, weights):  # type: ignore[no-untyped-def]
    """Code the columns of a block again, one after the other, where that lowers the error.

    values: [block, out] float32, the best of each column while all others stay; overwritten by how
        far what is stored has moved.
    ratios: [block, block] float32, H_pk / H_pp: how far column p moves per move of column k.
    columns, task: as of `quantize_block`.  quantized: [block, out] float32, what is stored.
    coded: [block, out] float32, the columns that `quantized` was coded from; both are brought up
        to date.
    weights: [out] float32, importance of the rows.
    Returns by how much the weighted squared distance of each column to its best fell: [block].
    """
    gains = np.zeros(len(columns))
    found = np.empty(values.shape[1], dtype=np.float32)
    for position in range(len(columns)):
        compensate(values, ratios, position)
        current, kept = values[position], quantized[position]
        code_column(current, columns[position], task, found)
        gain = closer(current, kept, found, weights)
        if gain >= 0.0:
            gains[position] = gain
            coded[position] = current
        else:  # a fit is no exact minimum: the column goes back to the codes that it had
            code_column(coded[position], columns[position], task, found)
        for row in range(len(current)):
            current[row] = found[row] - kept[row]
            kept[row] = found[row]
    return gains


@njit(cache=True, nogil=True, error_model="numpy")
def closer(wanted, before, after, weights):  # type: ignore[no-untyped-def]
    """Return by how much the weighted squared distance of a column falls: [out] float32 each."""
    gain = 0.0
    for row in range(len(wanted)):
        left, right = np.float64(before[row]), np.float64(after[row])
        gain += weights[row] * (left - right) * (left + right - 2.0 * np.float64(wanted[row]))
    return gain
