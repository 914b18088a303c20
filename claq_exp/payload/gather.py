"""Some rows of a packed matrix, decoded without the others: what an embedding looks up."""

from __future__ import annotations

import torch
from torch import Tensor

from claq_exp.payload.operand import Operand, Part
from claq_exp.payload.stored import HALF_MAX

BYTE = 8


def gathered(operand: Operand, rows: Tensor) -> Tensor:
    """Return rows of a matrix: [n, in] float32, the same bits as those of `Payload.dequantize`.

    rows: [n] int64, in any order and any number of times, on the device of the operand.  Raises
    IndexError for one that the matrix has not.
    """
    chosen, places = rows.unique(return_inverse=True)
    if len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < operand.rows:
        raise IndexError(f"rows {int(chosen[0])} to {int(chosen[-1])} of {operand.rows}")
    dense = torch.empty(operand.columns, len(chosen), device=operand.device)
    for part in operand.parts:
        codes = _codes(part, chosen)
        values = codes.float() if part.levels is None else part.levels.gather(1, codes)
        if part.columns is None:
            dense = values
        else:
            dense[part.columns] = values
    dense = _scaled(operand, dense.t().contiguous(), chosen).clamp_(-HALF_MAX, HALF_MAX)
    _put_reserved(operand, dense, chosen)
    return dense[places]


def _codes(part: Part, rows: Tensor) -> Tensor:
    """Return the codes of some rows in all columns of a part: [k, n] int64."""
    first, shift = rows * part.width // BYTE, rows * part.width % BYTE
    words = part.codes.index_select(1, first).int()
    if BYTE % part.width:  # a code may reach into a second byte
        last = part.codes.shape[1] - 1
        words |= part.codes.index_select(1, (first + 1).clamp(max=last)).int() << BYTE
    return (words >> shift.int()).bitwise_and_((1 << part.width) - 1).long()


def _scaled(operand: Operand, dense: Tensor, rows: Tensor) -> Tensor:
    """Return what levels or codes of some rows stand for: [n, in] float32."""
    columns = torch.arange(operand.columns, device=operand.device)
    if operand.grid is not None:
        dense = operand.grid.decoded(dense, columns, rows)
    if operand.row_levels is not None:
        dense = operand.row_levels[rows].gather(1, dense.long())
    if operand.decoder is not None:
        dense = operand.decoder.values(dense, columns, rows)
    if operand.row_scales is not None:
        dense = dense * operand.row_scales[rows, None]
    return dense


def _put_reserved(operand: Operand, dense: Tensor, rows: Tensor) -> None:
    """Write the reserved entries of some rows, which ascend, into them: [n, in] float32."""
    if not len(operand.reserved_rows) or not len(rows):
        return
    kept = operand.reserved_rows.long()
    places = torch.searchsorted(rows, kept).clamp(max=len(rows) - 1)
    asked = rows[places] == kept
    dense[places[asked], operand.reserved_columns[asked].long()] = operand.reserved_values[asked]
