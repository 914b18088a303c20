"""The column loop on a GPU: all linears with the same input at once, one kernel launch per column.

The same mathematics as `solver.columns` with a k-means codebook; sums are taken in another order
and the clustering is another heuristic, so that results agree closely, not bit by bit.  Nothing
inside the loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.payload.column_codebooks import ColumnCodebooks
from claq_exp.payload.columns import Reserved
from claq_exp.quantize.solver.columns import ColumnSystem, shift_
from claq_exp.system.accelerator import ROCM

SUB_BLOCK = 8  # columns whose errors the kernel gathers itself; a product spreads them further
LEAST_WARPS = 4
REGISTERS = 65536  # of a multiprocessor; unless told, ptxas may use half of a program's share


@dataclass(frozen=True)
class _Stack:
    """The linears of a group on the device, rows one after another, columns in visiting order.

    work: [in, rows] float32.  factor: [in, in] float32 or None.  errors: [block, rows] float32.
    codes: [in, rows] uint8.  levels: [in, linears, 2**widest] float16.
    plan: [2, in, linears] int32, bits and reserved counts.  first_row: [linears + 1] int32.
    first: [1] int32, the position at which the current sub-block begins.
    scales, row_weights: [rows] float32 or None.  scratch: [linears, PARTS] int64, weighted counts.
    starts: first_row on the host.
    """

    work: Tensor
    factor: Tensor | None
    errors: Tensor
    codes: Tensor
    levels: Tensor
    plan: Tensor
    first_row: Tensor
    first: Tensor
    scales: Tensor | None
    row_weights: Tensor | None
    scratch: Tensor
    starts: tuple[int, ...]
    block_size: int


def quantize_group_on_device(
    weights: Sequence[Tensor],
    system: ColumnSystem,
    column_bits: Sequence[Tensor],
    reserved_counts: Sequence[Tensor],
    device: torch.device | str,
    row_scales: Sequence[Tensor] | None = None,
    row_weights: Sequence[Tensor] | None = None,
    graph: bool = False,
) -> list[ColumnCodebooks]:
    """Quantize linears that share their input with a k-means codebook per column.

    weights: [out_l, in] float32 each.  column_bits: [in] uint8 each.  reserved_counts: [in] int64
    each.  row_scales: [out_l] float32 each, positive: codes then stand for weight / scale, while
    reserved values stay those of the weight.  row_weights: [out_l] float32 each, the price of a
    squared error in a row.  graph: record the launches of a sub-block once as a CUDA graph and
    replay it.  The results lie on the CPU.
    Raises NumericalError where a reserved value does not fit float16 or weights stop being finite,
    ConfigError without Triton.
    Source: GPTQ (arXiv 2210.17323, Algorithm 1), CLAQ (arXiv 2405.17233); GPTAQ (arXiv 2504.02692)
    where the system has a correction.
    """
    kernels = _kernels()
    stack = _stack(weights, system, (column_bits, reserved_counts), device, kernels)
    stack = replace(stack, scales=_rows(row_scales, device), row_weights=_rows(row_weights, device))
    with torch.cuda.device_of(stack.work), _full_float32():
        if system.correction is not None:
            shift_(stack.work, system.correction.to(stack.work.device))
        _solve(stack, _launcher(stack, kernels), graph and stack.work.is_cuda)
    inverse = torch.argsort(system.order.to(stack.work.device))
    halves = [None] * len(weights) if row_scales is None else [s.cpu().half() for s in row_scales]
    return [
        _result(stack, inverse, linear, (column_bits[linear], reserved_counts[linear]), scales)
        for linear, scales in enumerate(halves)
    ]


def _kernels() -> ModuleType:
    try:
        from claq_exp.quantize.kernels import column_step
    except ImportError as error:
        raise ConfigError(
            "quantizing on a GPU needs Triton, which is not installed here; "
            "install a GPU build of torch or `pip install triton`, or solve on the CPU"
        ) from error
    return column_step


def _stack(
    weights: Sequence[Tensor],
    system: ColumnSystem,
    plan: tuple[Sequence[Tensor], Sequence[Tensor]],
    device: torch.device | str,
    kernels: ModuleType,
) -> _Stack:
    order = system.order.to(device)
    work = torch.cat([weight.to(device, torch.float32) for weight in weights]).t()[order]
    columns, rows = work.shape
    starts = [0]
    for weight in weights:
        starts.append(starts[-1] + weight.shape[0])
    planned = [torch.stack([item.to(device, torch.int32) for item in part], 1) for part in plan]
    widest = 2 ** max(int(bits.max()) for bits in plan[0])
    factor = system.inverse_factor
    return _Stack(
        work=work.contiguous(),
        factor=None if factor is None else factor.to(device).contiguous(),
        errors=work.new_zeros(0 if factor is None else min(system.block_size, columns), rows),
        codes=torch.zeros(columns, rows, dtype=torch.uint8, device=device),
        levels=work.new_zeros(columns, len(weights), widest, dtype=torch.float16),
        plan=torch.stack([part[order] for part in planned]).contiguous(),
        first_row=torch.tensor(starts, dtype=torch.int32, device=device),
        first=torch.zeros(1, dtype=torch.int32, device=device),
        scales=None,
        row_weights=None,
        scratch=torch.zeros(len(weights), kernels.PARTS.value, dtype=torch.int64, device=device),
        starts=tuple(starts),
        block_size=system.block_size,
    )


def _rows(parts: Sequence[Tensor] | None, device: torch.device | str) -> Tensor | None:
    return None if parts is None else torch.cat([part.to(device, torch.float32) for part in parts])


@contextmanager
def _full_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _launcher(stack: _Stack, kernels: ModuleType) -> Callable[[int], None]:
    """Return the function that quantizes the column at *first + offset."""
    columns, rows = stack.work.shape
    tallest = max(stop - start for start, stop in pairwise(stack.starts))
    padded = max(32 * LEAST_WARPS, 1 << (tallest - 1).bit_length())
    compensated = stack.factor is not None
    reserves = bool((stack.plan[1] > 0).any())
    bits = stack.levels.shape[2].bit_length() - 1
    options = launch_options(padded, bits, rocm=ROCM)
    kernel = kernels.quantize_column[(len(stack.starts) - 1,)]

    def launch(offset: int) -> None:
        kernel(
            stack.work,
            stack.factor,
            stack.errors,
            stack.codes,
            stack.levels,
            stack.plan,
            stack.first_row,
            stack.first,
            stack.scales,
            stack.row_weights,
            stack.scratch,
            offset,
            columns,
            rows,
            padded=padded,
            bits=bits,
            block_size=stack.block_size,
            compensated=compensated,
            reserves=reserves,
            scaled=stack.scales is not None,
            weighted=stack.row_weights is not None,
            **options,
        )

    return launch


def launch_options(rows: int, bits: int, *, rocm: bool = False) -> dict[str, Any]:
    """Return Triton's options for a program of a power of two of rows: 16 to 32 values per thread.

    The clustering of 4 bits and more alone fills the registers of 4 warps, and so do 2,048 rows.
    rocm: a warp has 64 threads there, of at most 1024, and registers cannot be asked for.
    """
    least = LEAST_WARPS * (2 if bits >= 4 or rows > 1024 else 1)
    if rocm:
        return {"num_warps": min(max(rows // 1024, least), 16), "enable_fp_fusion": True}
    warps = 32 if rows > 16384 else min(max(rows // 512, least), 16)
    registers = min(REGISTERS // (32 * warps), 255)
    return {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": True}


def _solve(stack: _Stack, launch: Callable[[int], None], graph: bool) -> None:
    """Quantize all columns, block after block, sub-block after sub-block."""
    work, factor, errors = stack.work, stack.factor, stack.errors
    recorded: torch.cuda.CUDAGraph | None = None
    for start in range(0, len(work), stack.block_size):
        stop = min(start + stack.block_size, len(work))
        for first in range(start, stop, SUB_BLOCK):
            last = min(first + SUB_BLOCK, stop)
            stack.first.fill_(first)
            if recorded is not None and last - first == SUB_BLOCK:
                recorded.replay()
            else:
                for offset in range(last - first):
                    launch(offset)
            if graph and recorded is None and last - first == SUB_BLOCK:
                recorded = _record(launch)  # the kernel is compiled by now
            if factor is not None and last < stop:
                passed = factor[first:last, last:stop].t()
                work[last:stop].addmm_(passed, errors[first - start : last - start], alpha=-1)
        if factor is not None and stop < len(work):
            work[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)


def _record(launch: Callable[[int], None]) -> torch.cuda.CUDAGraph:
    """Record the launches of a full sub-block; recording runs nothing."""
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for offset in range(SUB_BLOCK):
            launch(offset)
    return recorded


def _result(
    stack: _Stack,
    inverse: Tensor,
    linear: int,
    plan: tuple[Tensor, Tensor],
    row_scales: Tensor | None,
) -> ColumnCodebooks:
    """Bring one linear to the CPU, its columns in their own order.

    inverse: [in] int64, the position at which a column was visited.
    """
    rows = slice(stack.starts[linear], stack.starts[linear + 1])
    column_bits, reserved_counts = plan
    levels = stack.levels[inverse, linear, : 2 ** int(column_bits.max())]
    return ColumnCodebooks(
        codes=stack.codes[:, rows][inverse].cpu().t(),
        column_bits=column_bits.cpu(),
        reserved=_reserved(stack.work[:, rows], inverse, reserved_counts.cpu()),
        values=levels.cpu(),
        row_scales=row_scales,
    )


def _reserved(work: Tensor, inverse: Tensor, counts: Tensor) -> Reserved:
    """Read the reserved entries off what the kernel left: their values, NaN elsewhere."""
    if not int(counts.sum()):
        return Reserved.none(len(counts))
    marked = work[inverse]
    kept = ~marked.isnan()
    if not torch.equal(kept.sum(dim=1).cpu(), counts):
        raise NumericalError(
            "compensated weights are no longer finite; use a larger solver.damping, or rescale "
            "the model's weights"
        )
    values = marked[kept]
    columns, rows = kept.nonzero(as_tuple=True)
    half = values.half()
    if not half.isfinite().all():
        column = int(columns[~half.isfinite()][0])
        raise NumericalError(
            f"column {column} has a weight of {values.abs().max().item():.3g}, beyond float16; "
            "reservation cannot keep it"
        )
    return Reserved(counts, rows.cpu(), half.cpu())
