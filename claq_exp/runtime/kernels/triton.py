"""Multiply by packed matrices on a GPU with Triton.

A few inputs at once are multiplied by looking up every code, up to `MOST_TILES` on tensor cores;
both read the packed matrix once and nothing else of its size.  Above, the matrix is written out
densely, `DENSE_BYTES` at a time, and multiplied by a matrix product of torch.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from claq_exp.payload.operand import Operand
from claq_exp.runtime.kernels.triton_operand import (
    TritonOperand,
    TritonPart,
    TritonReserved,
    prepare,
    run_rows,
)
from claq_exp.system.accelerator import ROCM

MOST_LOOKUPS = 4  # inputs; above, tensor cores take fewer instructions
MOST_ODD_LOOKUPS = 2  # a thread owns 32 rows of odd widths: its registers hold no more sums
MOST_TILES = 16
DENSE_BYTES = 1 << 26  # of a dense copy of some rows
PARTIAL_BYTES = 1 << 26  # of sums that wait for each other
SMALL = 1 << 25  # weights; a smaller part needs more programs per row to fill a GPU
JOINED = {1: 4, 2: 2}  # width -> columns whose codes are looked up at once,
MOST_JOINT = 2  # inputs: joint codes cost a shuffle for each
KERNELS = {"lookups": "sum_lookups", "joint": "sum_joint_lookups", "tiles": "sum_tiles"}
FINISH_ROWS, FINISH_DEPTH = 32, 32
DENSE_TILE = {"height": 64, "depth": 32}

Tuning = Mapping[str, Any]


class TritonKernel:
    """Multiplies on a CUDA device; keeps what it prepared for an operand as long as that lives.

    tuning: launch configurations in the form of tuning.json, which is used when left out.
    """

    most_inputs: ClassVar[int | None] = None  # it dequantizes by itself

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning
        # By identity: operands hold tensors, which have no single truth value to compare by.
        self._prepared: dict[int, TritonOperand] = {}

    def refusal(self, operand: Operand) -> str | None:
        """Say why this kernel cannot take the matrix on this machine, or None when it can."""
        try:
            import triton
        except ImportError:
            return "Triton is not installed"
        if operand.device.type != "cuda" and not triton.knobs.runtime.interpret:
            return f"the matrix lies on {operand.device}, not on a CUDA device"
        if operand.decoder is not None:
            return f"there is no Triton kernel for {operand.decoder.described}"
        if operand.clamps:
            return "some weights lie beyond float16 and are cut off there"
        return None

    def multiply(self, operand: Operand, inputs: Tensor) -> Tensor:
        """Return inputs @ matrix^T: [n, in] float16, bfloat16 or float32 -> [n, out] alike.

        Products are summed in float32, in an order that depends on shapes and GPU alone; above
        `MOST_TILES` inputs weights are rounded to the dtype of the inputs.
        """
        prepared = self._prepare(operand)
        n = len(inputs)
        inputs = inputs.contiguous()
        if not n:
            return inputs.new_empty(0, operand.rows)
        with torch.cuda.device_of(inputs):
            if too_wide(prepared, n, inputs.dtype):
                return _from_dense(prepared, inputs.float()).to(inputs.dtype)
            if n <= MOST_TILES:
                launches = _launches(prepared, n, self._tuning or default_tuning())
                splits = sum(launch.splits for launch in launches)
                if 4 * splits * n * operand.rows <= PARTIAL_BYTES:
                    return _from_codes(prepared, inputs, launches)
            return _from_dense(prepared, inputs)

    def rows(self, operand: Operand, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows of the matrix: [n, in], rounded from float32 to dtype.

        rows: [n] int64 on the device, in any order and any number of times.  One that the matrix
        has not is an error as it is of torch's embedding: no copy to the CPU waits for it.
        """
        prepared = self._prepare(operand)
        torch._assert_async(((rows >= 0) & (rows < operand.rows)).all())
        with torch.cuda.device_of(rows):
            return _dense(prepared, dtype, 0, len(rows), rows)

    def _prepare(self, operand: Operand) -> TritonOperand:
        prepared = self._prepared.get(id(operand))
        if prepared is None:
            prepared = self._prepared[id(operand)] = prepare(operand)
            weakref.finalize(operand, self._prepared.pop, id(operand), None)
        return prepared


def dense_rows(operand: Operand, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Return rows [first, last) of the matrix: [last - first, in], rounded from float32 to dtype.

    For an operand that TritonKernel does not refuse.
    """
    with torch.cuda.device_of(operand.parts[0].codes):
        return _dense(prepare(operand), dtype, first, last - first)


@cache
def default_tuning() -> Tuning:
    """Return the launch configurations of tuning.json."""
    text = resources.files(__package__).joinpath("tuning.json").read_text(encoding="utf-8")
    tuning: Tuning = json.loads(text)
    return tuning


def configuration(tuning: Tuning, family: str, width: int, weights: int) -> dict[str, int]:
    """Return the launch configuration of a part: its width and size class, or the default."""
    chosen: dict[str, int] = dict(tuning[family]["default"])
    chosen.update(tuning[family].get(str(width), {}).get(size_class(weights), {}))
    return chosen


def size_class(weights: int) -> str:
    """Return the size class of a part with so many weights."""
    return "small" if weights < SMALL else "large"


def _decode() -> ModuleType:
    from claq_exp.runtime.kernels import triton_decode

    return triton_decode


def _ceil(count: int, of: int) -> int:
    return -(-count // of)


@dataclass(frozen=True)
class _Launch:
    """How the sums over one part are launched.

    splits: shares of its columns, `span` columns each, `per_block` of them in every `block` of
    columns (those that share a row grid; all, where there is none).
    """

    part: TritonPart
    kernel: str
    row_blocks: int
    splits: int
    per_block: int
    block: int
    span: int
    warps: int
    constants: dict[str, int]


def _launches(prepared: TritonOperand, n: int, tuning: Tuning) -> list[_Launch]:
    return [_launch_of(prepared, part, n, tuning) for part in prepared.parts]


def _launch_of(prepared: TritonOperand, part: TritonPart, n: int, tuning: Tuning) -> _Launch:
    k, rows = len(part.codes), prepared.rows
    family = family_of(part.width, n)
    if family == "joint" and part.row_levels is not None:
        family = "lookups"  # every row has a table of its own
    batch = MOST_TILES if family == "tiles" else 1 << (n - 1).bit_length()
    chosen = configuration(tuning, family, part.width, rows * k)
    programs = chosen.pop("programs")
    warps = chosen.pop("warps", chosen["lanes"])
    height = run_rows(part.width)
    constants = {
        "width": part.width,
        "words": height * part.width // 32,
        "run_rows": height,
        "batch": batch,
        **chosen,
    }
    step = chosen["lanes"]
    if family == "joint":
        constants["joined"] = JOINED[part.width]
        step *= JOINED[part.width]
    row_blocks = _ceil(rows, 32 * height * chosen.get("runs", 1))
    block = k if prepared.grid is None else min(prepared.grid.size, k)
    blocks = _ceil(k, block)
    shares = _ceil(programs * prepared.multiprocessors, row_blocks * blocks)
    span = step * _ceil(block, step * shares)
    per_block = _ceil(block, span)
    return _Launch(
        part=part,
        kernel=KERNELS[family],
        row_blocks=row_blocks,
        splits=blocks * per_block,
        per_block=per_block,
        block=block,
        span=span,
        warps=warps,
        constants=constants,
    )


def family_of(width: int, n: int) -> str:
    """Return which of the families of tuning.json multiplies n <= `MOST_TILES` inputs."""
    if n > (MOST_ODD_LOOKUPS if width % 2 else MOST_LOOKUPS):
        return "tiles"
    return "joint" if width in JOINED and n <= MOST_JOINT else "lookups"


def _from_codes(prepared: TritonOperand, inputs: Tensor, launches: list[_Launch]) -> Tensor:
    decode = _decode()
    n, rows = len(inputs), prepared.rows
    splits = sum(launch.splits for launch in launches)
    partial = inputs.new_empty(splits, n, rows, dtype=torch.float32)
    first_split = 0
    for launch in launches:
        _launch_part(decode, launch, inputs, partial, first_split)
        first_split += launch.splits
    outputs = inputs.new_empty(n, rows)
    grid, reserved = prepared.grid, prepared.reserved
    decode.finish[(_ceil(rows, FINISH_ROWS), n)](
        partial,
        inputs,
        prepared.row_scales,
        None if grid is None else grid.scales,
        None if grid is None else grid.offsets,
        None if grid is None or grid.offsets is None else _group_sums(inputs, grid.size),
        None if reserved is None else reserved.starts,
        None if reserved is None else reserved.columns,
        None if reserved is None else reserved.changes,
        outputs,
        n,
        prepared.columns,
        rows,
        splits,
        None if grid is None else _group_of_split(prepared, launches),
        1 if grid is None else len(grid.scales),
        height=FINISH_ROWS,
        depth=FINISH_DEPTH,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return outputs


def _group_of_split(prepared: TritonOperand, launches: list[_Launch]) -> Tensor:
    """Return the group whose columns each partial sum is of: [splits] int32; kept."""
    shape = tuple((launch.splits, launch.per_block) for launch in launches)
    found = prepared.split_groups.get(shape)
    if found is None:
        groups = [
            launch.part.first_group + torch.arange(launch.splits) // launch.per_block
            for launch in launches
        ]
        found = torch.cat(groups).int().to(launches[0].part.codes.device)
        prepared.split_groups[shape] = found
    return found


def _launch_part(
    decode: ModuleType, launch: _Launch, inputs: Tensor, partial: Tensor, first_split: int
) -> None:
    part = launch.part
    n, size = inputs.shape
    arguments = (
        inputs,
        part.columns,
        part.codes,
        part.levels,
        part.row_levels,
        partial,
        n,
        size,
        len(part.codes),
        partial.shape[2],
        _ceil(partial.shape[2], run_rows(part.width)),
        part.codes.shape[1],
        launch.block,
        launch.per_block,
        launch.span,
        first_split,
    )
    constants: dict[str, Any] = dict(launch.constants)
    if launch.kernel == "sum_tiles":
        constants |= tile_constants(inputs.dtype, half=part.half, rocm=ROCM)
    kernel = getattr(decode, launch.kernel)[(launch.row_blocks, launch.splits)]
    kernel(*arguments, **constants, num_warps=launch.warps, num_stages=1, enable_fp_fusion=True)


def too_wide(prepared: TritonOperand, n: int, dtype: torch.dtype) -> bool:
    """Tell whether tiles take more shared memory than most devices have.

    The codes of an odd width fill whole words with 32 rows alone, so that a tile has 1024; in
    float32 it takes 64 KiB, and twice that where products take three of TF32.
    """
    return MOST_ODD_LOOKUPS < n <= MOST_TILES and any(
        part.width % 2 == 1 and not _exact(dtype, part.half) for part in prepared.parts
    )


def _exact(dtype: torch.dtype, half: bool) -> bool:
    """Tell whether TF32 holds inputs and levels, as it does every float16 and bfloat16."""
    return half and dtype != torch.float32


def tile_constants(dtype: torch.dtype, *, half: bool, rocm: bool = False) -> dict[str, Any]:
    """Return how `sum_tiles` multiplies inputs of a type by levels; half: float16 holds them all.

    Products of other numbers than TF32 holds take three of it.  AMD's devices multiply in float32,
    and most have no TF32.
    """
    on_cuda = "tf32" if _exact(dtype, half) else "tf32x3"
    return {
        "precision": "ieee" if rocm else on_cuda,
        "narrow": half and dtype == torch.float16,
    }


def _group_sums(inputs: Tensor, group_size: int) -> Tensor:
    """Return the sums of the inputs of every group: [n, groups] float32."""
    padded = functional.pad(inputs, (0, -inputs.shape[1] % group_size))
    return padded.view(len(inputs), -1, group_size).sum(dim=2, dtype=torch.float32)


def _from_dense(prepared: TritonOperand, inputs: Tensor) -> Tensor:
    height = max(1, DENSE_BYTES // (prepared.columns * inputs.element_size()))
    if height >= prepared.rows:
        return functional.linear(inputs, _dense(prepared, inputs.dtype, 0, prepared.rows))
    outputs = inputs.new_empty(len(inputs), prepared.rows)
    for first in range(0, prepared.rows, height):
        last = min(first + height, prepared.rows)
        weight = _dense(prepared, inputs.dtype, first, last - first)
        outputs[:, first:last] = functional.linear(inputs, weight)
    return outputs


def _dense(
    prepared: TritonOperand, dtype: torch.dtype, first: int, count: int, rows: Tensor | None = None
) -> Tensor:
    """Return `count` rows from `first` on, or those that `rows` [count] int64 names."""
    from claq_exp.runtime.kernels.triton_dense import dequantize

    device = prepared.parts[0].codes.device
    weight = torch.empty(count, prepared.columns, dtype=dtype, device=device)
    grid = prepared.grid
    for part in prepared.parts if count else ():
        k, pitch = part.codes.shape
        blocks = _ceil(count, DENSE_TILE["height"]), _ceil(k, DENSE_TILE["depth"])
        dequantize[blocks](
            part.columns,
            part.codes,
            part.levels,
            part.row_levels,
            prepared.row_scales,
            None if grid is None else grid.scales[part.first_group :],
            None if grid is None or grid.zeros is None else grid.zeros[part.first_group :],
            rows,
            weight,
            prepared.columns,
            k,
            prepared.rows,
            _ceil(prepared.rows, run_rows(part.width)),
            pitch,
            1 if grid is None else grid.size,
            first,
            count,
            width=part.width,
            **DENSE_TILE,
            num_warps=4,
            enable_fp_fusion=False,
        )
    reserved = prepared.reserved
    if reserved is not None and rows is not None:
        _put_reserved(reserved, rows, weight)
    elif reserved is not None:
        own = slice(int(reserved.host_starts[first]), int(reserved.host_starts[first + count]))
        at = (reserved.rows[own] - first).long(), reserved.columns[own].long()
        weight[at] = reserved.values[own].to(dtype)
    return weight


def _put_reserved(reserved: TritonReserved, rows: Tensor, weight: Tensor) -> None:
    """Write the reserved entries of some rows into them: [n, in]."""
    first, last = reserved.starts[rows].long(), reserved.starts[rows + 1].long()
    counts = last - first
    numbers = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
    entries = torch.arange(len(numbers), device=rows.device)
    entries += (last - counts.cumsum(0))[numbers]
    weight[numbers, reserved.columns[entries].long()] = reserved.values[entries].to(weight.dtype)
