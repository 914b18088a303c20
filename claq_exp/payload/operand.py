"""What a kernel multiplies by: the stored tensors of one matrix, with the small ones decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Part:
    """The columns of one code width.

    columns: [k] int64, their places among the inputs, ascending; None when they are all inputs.
    codes: [k, ceil(out * width / 8)] uint8, the codes of a column one after the other, the first in
        the lowest bits (`claq_exp.payload.packing`).
    levels: [k, 2**width] float32, what a column's codes stand for; None where a grid, levels of
        rows or a decoder says it.
    """

    width: int
    columns: Tensor | None
    codes: Tensor
    levels: Tensor | None


@dataclass(frozen=True)
class RowScales:
    """A scale and zero per row and group of columns: w = scale * (level - zero).

    The level is the code itself where a part has no levels: a uniform grid.

    scales, zeros: [out, groups] float32; no zeros stand for 0 everywhere.
    group_of: [in] int64.  In a part, column number k is in group number k // group_size of its own.
    """

    scales: Tensor
    zeros: Tensor | None
    group_size: int
    group_of: Tensor

    def to(self, device: torch.device) -> RowScales:
        """Return the same on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return RowScales(self.scales.to(device), zeros, self.group_size, self.group_of.to(device))

    def first_group(self, part: Part) -> int:
        """Return the group of the first column of a part."""
        return int(self.group_of[0 if part.columns is None else part.columns[0]])

    def decoded(self, levels: Tensor, columns: Tensor, rows: slice | Tensor) -> Tensor:
        """Return what levels of some rows and columns stand for: [rows, k] float32."""
        group = self.group_of[columns]
        if self.zeros is not None:
            levels = levels - self.zeros[rows][:, group]
        return self.scales[rows][:, group] * levels


class Decoder(Protocol):
    """What codes stand for where neither levels nor a grid say it: for the reference kernel alone.

    described: what a kernel says that it does not take, e.g. "block formats".
    """

    @property
    def described(self) -> str:
        """Name such matrices, in the plural."""

    def values(self, codes: Tensor, columns: Tensor, rows: slice | Tensor) -> Tensor:
        """Return what the codes of some rows and columns stand for: [rows, k] -> float32.

        columns: [k] int64, their places in the matrix.  rows: a stretch of them, or [n] int64.
        """

    def tensors(self) -> list[Tensor | None]:
        """Return the tensors that were decoded for this matrix."""


@dataclass(frozen=True)
class Operand:
    """One matrix [out, in] as kernels read it; codes are the stored bytes, not a copy.

    row_scales: [out] float32 that multiply what the levels give, or None.
    reserved_rows, reserved_columns: [r] int32; their entries have code 0, which counts for nothing.
    reserved_values: [r] float32, what stands in their place; no row scale applies.
    clamps: some level times its row scale lies beyond float16, where the matrix is cut off.
    decoder: what codes stand for where kernels cannot look it up; the parts have no levels then.
    row_levels: [out, 2**width] float32, what a row's codes stand for where they have levels of the
        row; there is one part then, without levels of its own.
    """

    rows: int
    columns: int
    parts: tuple[Part, ...]
    grid: RowScales | None
    row_scales: Tensor | None
    reserved_rows: Tensor
    reserved_columns: Tensor
    reserved_values: Tensor
    clamps: bool
    decoder: Decoder | None = None
    row_levels: Tensor | None = None

    def derived_tensors(self) -> list[Tensor]:
        """Return the tensors that were decoded, all but the codes."""
        tensors = [part.levels for part in self.parts] + [part.columns for part in self.parts]
        if self.grid is not None:
            tensors += [self.grid.scales, self.grid.zeros, self.grid.group_of]
        if self.decoder is not None:
            tensors += self.decoder.tensors()
        tensors += [self.row_levels, self.row_scales, self.reserved_rows, self.reserved_columns]
        return [tensor for tensor in [*tensors, self.reserved_values] if tensor is not None]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.parts[0].codes.device


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
    if operand.row_levels is not None:
        return operand.row_levels[rows.long(), 0].double()
    first = torch.zeros(operand.columns, dtype=torch.float64, device=operand.device)
    for part in operand.parts:
        if part.levels is not None:
            own = slice(None) if part.columns is None else part.columns
            first[own] = part.levels[:, 0].double()
    if operand.grid is not None:
        at, level = (rows, operand.grid.group_of[columns]), first[columns]
        if operand.grid.zeros is not None:
            level = level - operand.grid.zeros.double()[at]
        return operand.grid.scales.double()[at] * level
    if operand.row_scales is None:
        return first[columns]
    return first[columns] * operand.row_scales.double()[rows]
