"""The column loop that every solver shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import NumericalError
from claq_exp.quantize.codebook import ColumnQuantizer
from claq_exp.quantize.layout import HALF_MAX
from claq_exp.quantize.quantized import QuantizedWeight, Reserved


@dataclass(frozen=True)
class ColumnSystem:
    """How the columns of a matrix are visited and compensated.

    order: [in] int64, the visiting order.
    inverse_factor: [in, in] float32 upper triangular U with U^T U = inverse of the damped Hessian,
        rows and columns in visiting order; None without compensation.
    distortion_weight: [in] float32, layer loss per squared error of a column, columns in the
        matrix's own order.
    damping: share of the mean diagonal that was added to the diagonal; None without compensation.
    dead: number of inputs that were zero on every calibration token.
    block_size: columns between two updates of all later columns.
    """

    order: Tensor
    inverse_factor: Tensor | None
    distortion_weight: Tensor
    damping: float | None
    dead: int
    block_size: int


def quantize_columns(
    weight: Tensor,
    system: ColumnSystem,
    quantizer: ColumnQuantizer,
    column_bits: Tensor,
    reserved_counts: Tensor,
    *,
    select: str = "magnitude",
) -> QuantizedWeight:
    """Quantize column after column, spreading each column's error over the columns that follow.

    weight: [out, in] float32.  column_bits: [in] uint8.  reserved_counts: [in] int64.
    select: which entries are reserved: magnitude (`largest_rows`) or tails (`tail_rows`).
    With e_j = (w_j - q_j) / U_jj, every later column k becomes
    w_k - U_jk e_j (GPTQ, arXiv 2210.17323, eq. 3 and Algorithm 1).  Inside a block a column
    gathers the errors before it when its turn comes, so that no column is written twice.
    """
    order = system.order.numpy()
    work = weight.t().numpy()[order]  # [in, out]: a column is one stretch of memory
    counts = reserved_counts.numpy()
    select_rows = tail_rows if select == "tails" else largest_rows
    kept = [(_NO_ROWS, _NO_VALUES)] * len(order)
    factor = None
    if system.inverse_factor is not None:
        factor = np.ascontiguousarray(system.inverse_factor.t().numpy())
    for start in range(0, len(order), system.block_size):
        stop = min(start + system.block_size, len(order))
        errors = np.zeros((stop - start, work.shape[1]), dtype=np.float32)
        for position in range(start, stop):
            column, values = int(order[position]), work[position]
            if factor is not None and position > start:
                values = values - factor[position, start:position] @ errors[: position - start]
            rows = select_rows(values, int(counts[column]))
            quantized = quantizer.quantize(column, values, rows)
            if len(rows):
                kept[column] = rows, _to_half(values[rows], column)
                quantized[rows] = kept[column][1]
            if factor is not None:
                errors[position - start] = (values - quantized) / factor[position, position]
        if factor is not None and stop < len(order):
            work[stop:] -= factor[stop:, start:stop] @ errors
    return QuantizedWeight(
        codes=torch.from_numpy(quantizer.codes).t(),
        column_bits=column_bits,
        levels=quantizer.levels(),
        reserved=Reserved(
            counts=reserved_counts,
            rows=torch.from_numpy(np.concatenate([rows for rows, _ in kept])),
            values=torch.from_numpy(np.concatenate([values for _, values in kept])),
        ),
    )


_NO_ROWS = np.zeros(0, dtype=np.int64)
_NO_VALUES = np.zeros(0, dtype=np.float16)


def largest_rows(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the rows of the `count` largest magnitudes, ascending; ties go to the lower row."""
    return _top_rows(np.abs(values), count)


def tail_rows(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the rows of the ceil(count / 2) largest and floor(count / 2) smallest values.

    Ascending and all different, exactly `count`; ties go to the lower row.
    """
    top = _top_rows(values, (count + 1) // 2)
    left = np.delete(np.arange(len(values)), top)
    bottom = left[_top_rows(-values[left], count // 2)]
    return np.sort(np.concatenate([top, bottom]))


def _top_rows(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    if count == 0:
        return _NO_ROWS
    smallest = np.partition(values, len(values) - count)[len(values) - count]
    rows = np.flatnonzero(values >= smallest)
    if len(rows) > count:
        level = np.flatnonzero(values[rows] == smallest)
        rows = np.delete(rows, level[count - len(rows) :])
    return rows


def _to_half(values: NDArray[np.float32], column: int) -> NDArray[np.float16]:
    if np.abs(values).max() > HALF_MAX:
        raise NumericalError(
            f"column {column} has a weight of {np.abs(values).max():.3g}, beyond float16; "
            "reservation cannot keep it"
        )
    return values.astype(np.float16)
