"""What a kernel multiplies by: the stored tensors of one matrix, with the small ones decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from claq_exp.quantize.layout import HALF_MAX, WeightLayout
from claq_exp.quantize.number_formats.levels import BlockLevels
from claq_exp.quantize.quantized import RowGrid, unpack_side_tensors


@dataclass(frozen=True)
class Part:
    """The columns of one code width.

    columns: [k] int64, their places among the inputs, ascending; None when they are all inputs.
    codes: [k, ceil(out * width / 8)] uint8, the codes of a column one after the other, the first in
        the lowest bits (`claq_exp.quantize.packing`).
    levels: [k, 2**width] float32, what a column's codes stand for; None on a row grid.
    """

    width: int
    columns: Tensor | None
    codes: Tensor
    levels: Tensor | None


@dataclass(frozen=True)
class Grid:
    """A uniform grid per row and group of columns: w = scale * (code - zero).

    scales, zeros: [out, groups] float32.
    """

    scales: Tensor
    zeros: Tensor
    group_size: int


@dataclass(frozen=True)
class Operand:
    """One matrix [out, in] as kernels read it; codes are the stored bytes, not a copy.

    row_scales: [out] float32 that multiply what the levels give, or None.
    reserved_rows, reserved_columns: [r] int32; their entries have code 0, which counts for nothing.
    reserved_values: [r] float32, what stands in their place; no row scale applies.
    clamps: some level times its row scale lies beyond float16, where the matrix is cut off.
    blocks: what codes stand for in a block format; the parts have no levels then.
    """

    rows: int
    columns: int
    parts: tuple[Part, ...]
    grid: Grid | None
    row_scales: Tensor | None
    reserved_rows: Tensor
    reserved_columns: Tensor
    reserved_values: Tensor
    clamps: bool
    blocks: BlockLevels | None = None

    def derived_tensors(self) -> list[Tensor]:
        """Return the tensors that were decoded, all but the codes."""
        tensors = [part.levels for part in self.parts] + [part.columns for part in self.parts]
        if self.grid is not None:
            tensors += [self.grid.scales, self.grid.zeros]
        if self.blocks is not None:
            tensors += [self.blocks.steps, self.blocks.selectors]
        tensors += [self.row_scales, self.reserved_rows, self.reserved_columns]
        return [tensor for tensor in [*tensors, self.reserved_values] if tensor is not None]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.parts[0].codes.device


def operand_of(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> Operand:
    """Decode all but the codes; raises CheckpointError where tensors do not fit the layout."""
    device = tensors[f"codes_{next(iter(layout.columns_per_width))}"].device
    side = unpack_side_tensors(layout, tensors)
    levels, grid, blocks, row_scales, widest = None, None, None, None, 0.0
    if isinstance(side.levels, RowGrid):
        scales, zeros = side.levels.scales.float(), side.levels.zeros.float()
        top = 2.0 ** max(layout.columns_per_width) - 1
        widest = float((scales * torch.maximum(zeros, top - zeros)).max())
        grid = Grid(scales.to(device), zeros.to(device), side.levels.group_size)
    elif isinstance(side.levels, BlockLevels):
        blocks = side.levels.to(device)
        widest = float(blocks.steps.max() * blocks.grid.codebooks.abs().max())
    else:
        levels = side.levels.levels(side.column_bits)
        widest = float(levels.abs().max())
        if side.levels.row_scales is not None:
            row_scales = side.levels.row_scales.float().to(device)
            widest *= float(row_scales.abs().max())
    parts = []
    for width in sorted(layout.columns_per_width):
        chosen = torch.nonzero(side.column_bits == width).flatten()
        own = None if levels is None else levels[chosen, : 2**width].contiguous().to(device)
        whole = len(chosen) == layout.columns
        parts.append(
            Part(width, None if whole else chosen.to(device), tensors[f"codes_{width}"], own)
        )
    return Operand(
        rows=layout.rows,
        columns=layout.columns,
        parts=tuple(parts),
        grid=grid,
        row_scales=row_scales,
        reserved_rows=side.reserved.rows.to(device, torch.int32),
        reserved_columns=side.reserved.columns().to(device, torch.int32),
        reserved_values=side.reserved.values.float().to(device),
        clamps=widest > HALF_MAX,
        blocks=blocks,
    )


@dataclass(frozen=True)
class ReservedByRow:
    """Reserved entries row after row, for kernels that count their code 0 like any other.

    starts: [out + 1] int64 into the others.  rows, columns: [r] int32.  values: [r] float32.
    changes: [r] float32, value less what code 0 stands for there.
    """

    starts: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor
    changes: Tensor


def reserved_by_row(operand: Operand) -> ReservedByRow:
    """Sort the reserved entries by row, in a row by column."""
    order = torch.argsort(operand.reserved_rows, stable=True)  # they come column after column
    rows, columns = operand.reserved_rows[order], operand.reserved_columns[order]
    values = operand.reserved_values[order]
    counts = torch.bincount(rows, minlength=operand.rows)
    changes = (values.double() - _code_zero(operand, rows, columns)).float()
    return ReservedByRow(pad(counts.cumsum(0), (1, 0)), rows, columns, values, changes)


def _code_zero(operand: Operand, rows: Tensor, columns: Tensor) -> Tensor:
    """Return what code 0 stands for at some places: [r] float64."""
    if operand.grid is not None:
        at = rows, columns // operand.grid.group_size
        return -operand.grid.scales.double()[at] * operand.grid.zeros.double()[at]
    first = torch.zeros(operand.columns, dtype=torch.float64, device=operand.device)
    for part in operand.parts:
        if part.levels is not None:
            own = slice(None) if part.columns is None else part.columns
            first[own] = part.levels[:, 0].double()
    if operand.row_scales is None:
        return first[columns]
    return first[columns] * operand.row_scales.double()[rows]
