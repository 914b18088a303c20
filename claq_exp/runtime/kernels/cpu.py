"""Products with a packed matrix on the CPU, by C code that is compiled where it runs."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from claq_exp.payload.operand import Operand, reserved_by_row
from claq_exp.runtime.kernels.build import NATIVE, BuildError, library

LANES_MOST = 16  # rows that the widest vectors hold; grids are padded to whole vectors


class _Part(ctypes.Structure):
    """`Part` of cpu.c."""

    _fields_ = [
        ("width", c_int64),
        ("count", c_int64),
        ("stride", c_int64),
        ("columns", c_void_p),
        ("codes", c_void_p),
        ("levels", c_void_p),
        ("first_group", c_int64),
    ]


class _Matrix(ctypes.Structure):
    """`Matrix` of cpu.c."""

    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("part_count", c_int64),
        ("parts", c_void_p),
        ("group_size", c_int64),
        ("grid_stride", c_int64),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("row_scales", c_void_p),
        ("reserved_starts", c_void_p),
        ("reserved_columns", c_void_p),
        ("reserved_deltas", c_void_p),
        ("row_stride", c_int64),
        ("row_levels", c_void_p),
    ]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix as cpu.c takes it.

    address: of the C structure.  kept: what it points to, so that it stays.
    """

    address: int
    kept: tuple[object, ...]


@dataclass(frozen=True)
class CpuKernel:
    """Looks codes up in vector registers; four activation rows cost about two products of one.

    instructions: compiler flags that choose the instruction set.
    """

    most_inputs: ClassVar[int | None] = 2048
    instructions: tuple[str, ...] = NATIVE

    def refusal(self, operand: Operand) -> str | None:
        """Say why this kernel cannot take the matrix on this machine, or None when it can.

        The first call compiles (some ten seconds), unless the cache has the library.
        """
        if operand.device.type != "cpu":
            return f"the CPU kernel cannot read a matrix on {operand.device}"
        if operand.decoder is not None:
            return f"there is no CPU kernel for {operand.decoder.described}"
        if operand.clamps:
            return "the CPU kernel does not cut weights off at the largest float16"
        try:
            library(self.instructions)
        except BuildError as error:
            return str(error)
        return None

    def multiply(self, operand: Operand, inputs: Tensor) -> Tensor:
        """Return inputs @ matrix^T: [n, in] of a floating dtype -> [n, out] of the same dtype.

        Products are summed in float32, over 32 columns at a time; an output does not depend on the
        number of threads.  Takes no part in automatic differentiation.
        """
        x = inputs.to(torch.float32).contiguous()
        y = torch.empty(len(x), operand.rows, dtype=torch.float32)
        _multiply(self.instructions)(
            prepare(operand).address, len(x), x.data_ptr(), y.data_ptr(), torch.get_num_threads()
        )
        return y.to(inputs.dtype)


@cache
def _multiply(instructions: tuple[str, ...]) -> Callable[[int, int, int, int, int], int]:
    function = library(instructions).claq_multiply
    function.argtypes = [c_void_p, c_int64, c_void_p, c_void_p, c_int64]
    function.restype = c_int64
    return function


_prepared: dict[int, PackedMatrix] = {}  # by the id of a living operand


def prepare(operand: Operand) -> PackedMatrix:
    """Return the form of an operand that cpu.c takes; kept as long as the operand lives."""
    matrix = _prepared.get(id(operand))
    if matrix is None:
        matrix = _prepared[id(operand)] = _pack(operand)
        weakref.finalize(operand, _prepared.pop, id(operand), None)
    return matrix


def _pack(operand: Operand) -> PackedMatrix:
    kept: list[object] = []

    def pointer(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.contiguous())
        return int(kept[-1].data_ptr())  # type: ignore[attr-defined]

    parts = (_Part * len(operand.parts))()
    for place, part in zip(parts, operand.parts, strict=True):
        place.width, (place.count, place.stride) = part.width, part.codes.shape
        place.columns, place.codes = pointer(part.columns), pointer(part.codes)
        place.levels = pointer(part.levels)
        place.first_group = 0 if operand.grid is None else operand.grid.first_group(part)
    matrix = _Matrix(rows=operand.rows, columns=operand.columns, part_count=len(parts))
    matrix.parts = ctypes.addressof(parts)
    if operand.grid is not None:
        extra = -operand.rows % LANES_MOST
        matrix.group_size = operand.grid.group_size
        matrix.grid_stride = operand.rows + extra
        matrix.scales = pointer(pad(operand.grid.scales.t(), (0, extra)))
        if operand.grid.zeros is not None:
            matrix.zeros = pointer(pad(operand.grid.zeros.t(), (0, extra)))
    if operand.row_levels is not None:
        extra = -operand.rows % LANES_MOST
        matrix.row_stride = operand.rows + extra
        matrix.row_levels = pointer(pad(operand.row_levels.t(), (0, extra)))
    matrix.row_scales = pointer(operand.row_scales)
    if len(operand.reserved_rows):
        entries = reserved_by_row(operand)
        matrix.reserved_starts = pointer(entries.starts)
        matrix.reserved_columns = pointer(entries.columns)
        matrix.reserved_deltas = pointer(entries.changes)
    return PackedMatrix(ctypes.addressof(matrix), (parts, matrix, *kept))
