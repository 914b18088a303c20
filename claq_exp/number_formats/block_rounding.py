"""Rounding to a block format as one Triton kernel: bit for bit what `compiled.round_rows` does.

One program rounds neighbouring blocks: it divides numbers by the steps of their arrays, looks the
nearest codewords up, sums the squared errors of all codebooks over each block, and writes codeword
times step.  Maxima, scales and steps are found before, in torch (`number_formats.scales`).

The kernel reads and writes every number once, 4 bytes together of a 16-bit type and 8 of a
float32, and reads 4 bytes of step per array.  What can limit it is thus memory bandwidth; with 16
codebooks a number also takes 64 bytes of the lookup table, out of the L1 cache, and some 50
floating-point operations, which is of the same order.  The second look at a block finds it in L1.

Equality bit by bit needs divisions that are rounded as IEEE 754 says, products and sums that are
not fused, and a sum of errors from the first number of a block to the last: a program therefore
holds one number of each of its blocks at a time.
"""

from __future__ import annotations

import weakref
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from claq_exp.number_formats.table import FormatCodebooks

BLOCKS = 32  # of a program that chooses codebooks, of one warp: nothing waits at a barrier
NUMBERS, WARPS = 2048, 4  # of a program that does not
MOST_RUN, MOST_PIECE = 128, 16  # neighbours in registers at once
MOST_UNROLL = 4  # numbers in flight at once: 110 registers with 16 codebooks, where 8 take 166
MOST_BLOCKS = 2**31 - NUMBERS  # of a launch: they are counted in 32 bits
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _scaled_places(values, steps, resolution, offset):  # type: ignore[no-untyped-def]
    """Return numbers in units of their steps, and their places, see `table.LookupTable`.

    Not by `tl.floor` and `tl.ceil`, which take the least float32 numbers for 0.
    """
    scaled = tl.where(steps > 0.0, tl.div_rn(values, steps), 0.0)
    limit = (offset // 2).to(tl.float32)
    halves = tl.minimum(tl.maximum(scaled * resolution, -limit), limit)
    whole = halves.to(tl.int32)
    above = (halves > whole.to(tl.float32)).to(tl.int32)
    below = (halves < whole.to(tl.float32)).to(tl.int32)
    return scaled, 2 * whole + above - below + offset


@triton.jit
def _chosen_books(  # type: ignore[no-untyped-def]
    source_ptr,
    table_ptr,
    begin,
    left,
    steps,
    resolution,
    offset,
    block: tl.constexpr,
    books: tl.constexpr,
    unroll: tl.constexpr,
    ragged: tl.constexpr,
):
    """Return the codebook of each block with the least squared error, the first of equals.

    begin, left: [blocks], where a block begins, and the numbers that are left of its row.
    """
    book = tl.arange(0, books)
    errors = tl.zeros([begin.shape[0], books], tl.float32)
    for first in range(0, block, unroll):
        for ahead in tl.static_range(unroll):
            inside = first + ahead < left
            value = tl.load(source_ptr + begin + (first + ahead), mask=inside, other=0.0)
            scaled, places = _scaled_places(value.to(tl.float32), steps, resolution, offset)
            words = tl.load(table_ptr + places[:, None] * books + book[None, :])
            miss = scaled[:, None] - words
            square = miss * miss
            if ragged:
                square = tl.where(inside[:, None], square, 0.0)
            errors += square
    errors = tl.where(errors < float("inf"), errors, float("inf"))  # also in place of NaN
    return tl.argmin(errors, axis=1, tie_break_left=True)


@triton.jit
def round_blocks(  # type: ignore[no-untyped-def]
    source_ptr,
    target_ptr,
    steps_ptr,
    table_ptr,
    count,
    columns,
    row_blocks,
    array_blocks,
    row_arrays,
    resolution,
    offset,
    block: tl.constexpr,
    books: tl.constexpr,
    height: tl.constexpr,
    piece: tl.constexpr,
    unroll: tl.constexpr,
    ragged: tl.constexpr,
):
    """Round `height` blocks of `block` neighbours each, of `count` in all.

    source, target: [rows, columns], they may be the same; target is written.
    steps: [rows, row_arrays] float32.  table: [places, books] float32, infinite beyond the
    codebooks that there are.  row_blocks, array_blocks: blocks of a row, of an array.
    books, height, piece: powers of two; the rest of a block is done in pieces.  unroll divides
    block.  ragged: rows end within a block.
    """
    number = tl.program_id(0) * height + tl.arange(0, height)
    there = number < count
    row, place = number // row_blocks, number % row_blocks
    left = tl.where(there, columns - place * block, 0)
    begin = row.to(tl.int64) * columns + place * block
    at_steps = row.to(tl.int64) * row_arrays + place // array_blocks
    steps = tl.load(steps_ptr + at_steps, mask=there, other=1.0)
    chosen = tl.zeros([height], tl.int32)
    if books > 1:
        chosen = _chosen_books(
            source_ptr,
            table_ptr,
            begin,
            left,
            steps,
            resolution,
            offset,
            block,
            books,
            unroll,
            ragged,
        )
        tl.debug_barrier()  # other threads may write over what this one has read
    left = tl.minimum(left, block)
    for first in range(0, block, piece):
        index = first + tl.arange(0, piece)
        inside = tl.broadcast_to(there[:, None], [height, piece])
        if ragged or block % piece != 0:
            inside = index[None, :] < left[:, None]
        at = begin[:, None] + index[None, :]
        value = tl.load(source_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scaled, places = _scaled_places(value, steps[:, None], resolution, offset)
        rounded = tl.load(table_ptr + places * books + chosen[:, None]) * steps[:, None]
        rounded = tl.where(tl.abs(scaled) <= float("inf"), rounded, scaled)  # NaN stays NaN
        tl.store(target_ptr + at, rounded.to(target_ptr.dtype.element_ty), mask=inside)


def round_on_gpu(
    values: Tensor, steps: Tensor, grid: FormatCodebooks, target: Tensor | None = None
) -> None:
    """Replace numbers with known steps by the nearest that the format has.

    values: [rows, columns] float32, float16 or bfloat16, contiguous, overwritten.
    steps: [rows, arrays] float32.  target: like values, to be written in their place.
    """
    target = values if target is None else target
    columns = values.shape[1]
    if not values.numel():
        return
    block, launch = _launch(grid, columns)
    row_blocks = -(-columns // block)
    array_blocks = (grid.format.array or row_blocks * block) // block
    table, steps = _table_on(grid, values.device), steps.contiguous()
    most = max(1, MOST_BLOCKS // row_blocks)
    with torch.cuda.device_of(values):
        for first in range(0, len(values), most):
            part = slice(first, first + most)
            count = len(values[part]) * row_blocks
            round_blocks[(triton.cdiv(count, launch["height"]),)](
                values[part],
                target[part],
                steps[part],
                table,
                count,
                columns,
                row_blocks,
                array_blocks,
                steps.shape[1],
                grid.table.resolution,
                grid.table.offset,
                block=block,
                books=table.shape[1],
                **launch,
                enable_fp_fusion=False,
            )


def _launch(grid: FormatCodebooks, columns: int) -> tuple[int, dict[str, int]]:
    """Return the numbers of a block, and how a program goes through its blocks.

    Where there is no choice of codebooks, blocks are runs of neighbours with the same step.
    """
    if grid.format.codebooks > 1:
        block = grid.format.block
        piece = min(triton.next_power_of_2(block), MOST_PIECE)
        launch = {"height": BLOCKS, "piece": piece, "num_warps": 1}
    else:
        block = gcd(grid.format.array, MOST_RUN)
        launch = {"height": NUMBERS // block, "piece": block, "num_warps": WARPS}
    return block, {**launch, "unroll": gcd(block, MOST_UNROLL), "ragged": columns % block != 0}


# By identity: grids hold tensors, which have no single truth value to compare by.
_TABLES: dict[int, dict[torch.device, Tensor]] = {}


def _table_on(grid: FormatCodebooks, device: torch.device) -> Tensor:
    """Return the codewords of a grid by place, on a device; kept there as long as the grid lives.

    [places, a power of two] float32, infinite beyond the codebooks that there are.
    """
    copies = _TABLES.get(id(grid))
    if copies is None:
        copies = _TABLES[id(grid)] = {}
        weakref.finalize(grid, _TABLES.pop, id(grid), None)
    if device not in copies:
        width = triton.next_power_of_2(grid.format.codebooks)
        copies[device] = torch.from_numpy(grid.table.padded[:, :width]).contiguous().to(device)
    return copies[device]
