"""A dense copy of packed rows as a Triton kernel."""

# ruff: noqa: PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _levels_at(
    codes_ptr, levels_ptr, row_levels_ptr, column, row, inside, pitch, row_runs, width: tl.constexpr
):
    """Return what the codes of columns [a, 1] at rows [1, b] stand for: [a, b] float32."""
    bit = row * width
    word, shift = bit >> 5, (bit & 31).to(tl.uint32)
    at = column * pitch + word
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % width != 0:
        broken = shift > 32 - width
        above = tl.load(codes_ptr + at + 1, mask=inside & broken, other=0)
        code |= above.to(tl.uint32, bitcast=True) << ((32 - shift) & 31)
    code = (code & (2**width - 1)).to(tl.int32)
    level = code.to(tl.float32)
    if levels_ptr is not None:
        level = tl.load(levels_ptr + column * (2**width) + code, mask=inside, other=0.0)
    if row_levels_ptr is not None:
        run_rows: tl.constexpr = 32 // (width & -width)
        at = (row % run_rows * (2**width) + code) * row_runs + row // run_rows
        level = tl.load(row_levels_ptr + at, mask=inside, other=0.0)
    return level


@triton.jit(do_not_specialize=["first_row", "count"])
def dequantize(
    columns_ptr,
    codes_ptr,
    levels_ptr,
    row_levels_ptr,
    row_scales_ptr,
    grid_scales_ptr,
    zeros_ptr,
    rows_ptr,
    weight_ptr,
    size,
    k,
    rows,
    row_runs,
    pitch,
    group_size,
    first_row,
    count,
    width: tl.constexpr,
    height: tl.constexpr,
    depth: tl.constexpr,
):
    """Write the columns of one width as a dense matrix, but for reserved entries.

    weight: [count, size], written.  rows_ptr: [count] int64, the rows of the matrix that it has;
    None for those from first_row on.  grid_scales, zeros: [groups, rows] float32, or None each.
    The rest as in `triton_decode`.
    """
    number = tl.program_id(0) * height + tl.arange(0, height)
    column = tl.program_id(1) * depth + tl.arange(0, depth)
    there = number < count
    row = first_row + number
    if rows_ptr is not None:
        row = tl.load(rows_ptr + number, mask=there, other=0).to(tl.int32)
        there &= (row >= 0) & (row < rows)
    inside = (column < k)[:, None] & there[None, :]
    value = _levels_at(
        codes_ptr,
        levels_ptr,
        row_levels_ptr,
        column[:, None],
        row[None, :],
        inside,
        pitch,
        row_runs,
        width,
    )
    if grid_scales_ptr is not None:
        at = (column // group_size)[:, None] * rows + row[None, :]
        scale = tl.load(grid_scales_ptr + at, mask=inside, other=0.0)
        if zeros_ptr is not None:
            value -= tl.load(zeros_ptr + at, mask=inside, other=0.0)
        value *= scale
    if row_scales_ptr is not None:
        value *= tl.load(row_scales_ptr + row, mask=there, other=0.0)[None, :]
    place = column
    if columns_ptr is not None:
        place = tl.load(columns_ptr + column, mask=column < k, other=0)
    at = number.to(tl.int64)[:, None] * size + place[None, :]
    turned = tl.trans(value).to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + at, turned, mask=there[:, None] & (column < k)[None, :])
