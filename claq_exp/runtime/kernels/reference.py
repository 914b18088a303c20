"""Dequantize, then multiply: any device, any matrix; the other kernels are held against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from claq_exp.payload.operand import Operand
from claq_exp.payload.packing import GROUP, unpack
from claq_exp.payload.stored import HALF_MAX, packed_bytes

CHUNK = 1 << 24  # weights that are dense at a time, to bound memory


@dataclass(frozen=True)
class ReferenceKernel:
    """Expand a chunk of output rows to the type of the inputs and multiply by it."""

    most_inputs: ClassVar[int | None] = None

    def refusal(self, _: Operand) -> str | None:
        """It takes everything."""
        return None

    def multiply(self, operand: Operand, inputs: Tensor) -> Tensor:
        """Return inputs @ matrix^T, see Kernel; sums are those of torch's product."""
        outputs = inputs.new_empty(len(inputs), operand.rows)
        for start, stop in _stretches(operand):
            dense = dense_rows(operand, start, stop).to(inputs.dtype)
            outputs[:, start:stop] = linear(inputs, dense)
        return outputs


REFERENCE = ReferenceKernel()


def multiply_back(operand: Operand, gradient: Tensor) -> Tensor:
    """Return gradient @ matrix: [n, out] -> [n, in], what reaches the inputs of a product."""
    total = gradient.new_zeros(len(gradient), operand.columns)
    for start, stop in _stretches(operand):
        dense = dense_rows(operand, start, stop).to(gradient.dtype)
        total += gradient[:, start:stop] @ dense
    return total


def _stretches(operand: Operand) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the rows that are dense at a time."""
    step = max(CHUNK // operand.columns // GROUP, 1) * GROUP
    for start in range(0, operand.rows, step):
        yield start, min(start + step, operand.rows)


def dense_rows(operand: Operand, start: int, stop: int) -> Tensor:
    """Return rows of the matrix: [stop - start, in] float32, equal to Payload.dequantize.

    start: a multiple of `GROUP`.
    """
    dense = torch.empty(operand.columns, stop - start, device=operand.device)
    for part in operand.parts:
        stretch = part.codes[:, start * part.width // 8 : packed_bytes(stop, part.width)]
        codes = unpack(stretch, part.width, stop - start)
        if part.levels is None:
            values = codes.float()
        else:
            values = torch.gather(part.levels, 1, codes.long())
        if part.columns is None:
            dense = values
        else:
            dense[part.columns] = values
    dense = dense.t().contiguous()
    if operand.grid is not None:
        columns = torch.arange(operand.columns, device=operand.device)
        dense = operand.grid.decoded(dense, columns, slice(start, stop))
    if operand.row_levels is not None:
        dense = operand.row_levels[start:stop].gather(1, dense.long())
    if operand.decoder is not None:
        columns = torch.arange(operand.columns, device=operand.device)
        dense = operand.decoder.values(dense, columns, slice(start, stop))
    if operand.row_scales is not None:
        dense *= operand.row_scales[start:stop, None]
    dense.clamp_(-HALF_MAX, HALF_MAX)
    inside = (operand.reserved_rows >= start) & (operand.reserved_rows < stop)
    rows, columns = operand.reserved_rows[inside] - start, operand.reserved_columns[inside]
    dense[rows, columns] = operand.reserved_values[inside]
    return dense
