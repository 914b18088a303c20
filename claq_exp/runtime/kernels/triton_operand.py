"""A packed matrix as the Triton kernels read it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from claq_exp.payload.operand import Operand, Part, RowScales, reserved_by_row


@dataclass(frozen=True)
class TritonPart:
    """A part as kernels read it.

    columns: [k] int32 or None.  codes: [k, pitch] int32.  levels: as in Part.  half: float16 holds
    every level.
    first_group: the group of its first column on a row grid.
    row_levels: [run_rows, 2**width, runs] float32, levels of rows, or None: row i is number
    i % run_rows of run i // run_rows, and lanes of a warp own neighbouring runs.
    """

    width: int
    columns: Tensor | None
    codes: Tensor
    levels: Tensor | None
    half: bool
    first_group: int = 0
    row_levels: Tensor | None = None


def run_rows(width: int) -> int:
    """Return the fewest rows whose codes fill whole words: a run."""
    return 32 // (width & -width)


@dataclass(frozen=True)
class TritonGrid:
    """A row grid, groups first: scales, zeros, offsets (scale * zero) are [groups, out] float32.

    zeros, offsets: None for 0 everywhere.
    """

    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    size: int


@dataclass(frozen=True)
class TritonReserved:
    """Reserved entries, row after row.

    starts: [out + 1] int32.  rows, columns: [r] int32.  values: [r] float32.  changes: [r] float32,
    value less what code 0 counts for.  host_starts: starts on the CPU.
    """

    starts: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor
    changes: Tensor
    host_starts: Tensor


@dataclass(frozen=True)
class TritonOperand:
    """What is worked out once for a matrix; it shares the large tensors with its operand.

    split_groups: for launches of so many partial sums, the group that each is of: [splits] int32.
    """

    rows: int
    columns: int
    parts: tuple[TritonPart, ...]
    grid: TritonGrid | None
    row_scales: Tensor | None
    reserved: TritonReserved | None
    multiprocessors: int
    split_groups: dict[tuple[tuple[int, int], ...], Tensor] = field(default_factory=dict)


def prepare(operand: Operand) -> TritonOperand:
    """Work out what kernels need beside the tensors of an operand."""
    device = operand.device
    count = 1
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    return TritonOperand(
        rows=operand.rows,
        columns=operand.columns,
        parts=tuple(_prepare_part(operand, part) for part in operand.parts),
        grid=None if operand.grid is None else _prepare_grid(operand.grid),
        row_scales=operand.row_scales,
        reserved=_prepare_reserved(operand) if len(operand.reserved_rows) else None,
        multiprocessors=count,
    )


def _prepare_part(operand: Operand, part: Part) -> TritonPart:
    row_levels = operand.row_levels
    codes = part.codes.contiguous()
    if codes.shape[1] % 4 or codes.data_ptr() % 4:
        # Kernels read whole words; of the shapes of language models none needs this copy.
        codes = functional.pad(codes, (0, -codes.shape[1] % 4)).clone()
    levels = part.levels
    known = levels if row_levels is None else row_levels
    return TritonPart(
        width=part.width,
        columns=None if part.columns is None else part.columns.int(),
        codes=codes.view(torch.int32),
        levels=None if levels is None else levels.contiguous(),
        half=known is None or torch.equal(known.half().float(), known),
        first_group=0 if operand.grid is None else operand.grid.first_group(part),
        row_levels=None if row_levels is None else _by_run(row_levels, run_rows(part.width)),
    )


def _by_run(row_levels: Tensor, size: int) -> Tensor:
    """Return [out, entries] as [size, entries, runs], with zeros in the last run."""
    rows, entries = row_levels.shape
    padded = functional.pad(row_levels, (0, 0, 0, -rows % size))
    return padded.view(-1, size, entries).permute(1, 2, 0).contiguous()


def _prepare_grid(grid: RowScales) -> TritonGrid:
    scales = grid.scales.t().contiguous()
    if grid.zeros is None:
        return TritonGrid(scales, None, None, grid.group_size)
    zeros = grid.zeros.t().contiguous()
    return TritonGrid(scales, zeros, scales * zeros, grid.group_size)


def _prepare_reserved(operand: Operand) -> TritonReserved:
    entries = reserved_by_row(operand)
    starts = entries.starts.int()
    return TritonReserved(
        starts=starts,
        rows=entries.rows,
        columns=entries.columns,
        values=entries.values,
        changes=entries.changes,
        host_starts=starts.cpu(),
    )
