"""The search for the nearest codewords: compiled on a CPU, in torch everywhere else.

Rounding on a GPU is a Triton kernel, where Triton is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from claq_exp.number_formats.compiled import encode_rows, round_rows
from claq_exp.number_formats.table import FormatCodebooks

LEAST_NUMBERS = 1 << 14  # of a thread: a twentieth of a millisecond


def spread(values: Tensor, length: int, columns: int) -> Tensor:
    """Give each of `columns` neighbours the value of its stretch: [..., n] -> [..., columns].

    length: of a stretch, 0 for a single one.
    """
    stretch = min(length or columns, columns)
    return values.repeat_interleave(stretch, dim=-1)[..., :columns]


def find_codes(
    values: Tensor, steps: Tensor, grid: FormatCodebooks
) -> tuple[Tensor, Tensor | None]:
    """Return codes and selectors of numbers with known steps.

    values: [rows, columns] float32.  steps: [rows, arrays] float32, what a codeword is multiplied
    by; 0 for arrays of zeros.
    Returns uint8 [rows, columns] and [rows, blocks], None where there is one codebook.
    """
    if values.device.type != "cpu":
        return search_in_torch(values, steps, grid)
    block_format, table = grid.format, grid.table
    rows, columns = values.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    selectors = torch.empty(rows, block_format.blocks(columns), dtype=torch.uint8)
    numbers, scales = values.contiguous().numpy(), steps.contiguous().numpy()
    about = table.padded, table.codes.numpy(), np.float32(table.resolution), _sizes(grid, columns)

    def encode(part: slice) -> None:
        written = codes[part].numpy(), selectors[part].numpy()
        encode_rows(numbers[part], scales[part], *about, *written)

    _side_by_side(encode, rows, columns)
    return codes, selectors if block_format.codebooks > 1 else None


def round_numbers(values: Tensor, steps: Tensor, grid: FormatCodebooks) -> Tensor:
    """Return those numbers that the codes of numbers with known steps stand for.

    values: [rows, columns] of a floating dtype, which the result has too; rounded to it from
    float32.  steps: as in `find_codes`.
    """
    kernel = _gpu_kernel() if values.device.type == "cuda" else None
    if kernel is not None and values.dtype in kernel.DTYPES:
        values = values.contiguous()
        rounded = torch.empty_like(values)
        kernel.round_on_gpu(values, steps, grid, rounded)
        return rounded
    if values.device.type != "cpu":
        codes, selectors = search_in_torch(values.float(), steps, grid)
        wide = _wide(steps, grid, values.shape[1])
        found = (codewords(codes, selectors, grid) * wide).to(values.dtype)
        return torch.where(values.isfinite(), found, values)
    rounded = torch.empty(values.shape, dtype=torch.float32)
    table, written = grid.table, rounded.numpy()
    numbers, scales = values.float().contiguous().numpy(), steps.contiguous().numpy()
    about = table.padded, np.float32(table.resolution), _sizes(grid, values.shape[1])
    _side_by_side(
        lambda part: round_rows(numbers[part], scales[part], *about, written[part]), *values.shape
    )
    return rounded.to(values.dtype)


def codewords(codes: Tensor, selectors: Tensor | None, grid: FormatCodebooks) -> Tensor:
    """Return the codewords of codes [..., columns]: float32."""
    books = grid.codebooks.to(codes.device)
    if selectors is None:
        return books[0][codes.long()]
    wide = spread(selectors.long(), grid.format.block, codes.shape[-1])
    return books.reshape(-1)[wide * books.shape[1] + codes]


def search_in_torch(
    values: Tensor, steps: Tensor, grid: FormatCodebooks
) -> tuple[Tensor, Tensor | None]:
    """Find codes and selectors as `find_codes`, on any device, one codebook after the other.

    A block takes the codebook with the smallest sum of squared errors, the first of equals.  The
    sum is in float32, from the first number to the last.
    """
    block_format, columns, table = grid.format, values.shape[1], grid.table
    wide = _wide(steps, grid, columns)
    scaled = torch.where(wide > 0, values / wide, 0.0).nan_to_num()
    places = table.places(scaled)
    all_codes = table.codes.to(values.device)
    if block_format.codebooks == 1:
        return all_codes[:, 0][places], None
    shape = -1, block_format.block
    missing = -columns % block_format.block
    words = table.codewords.to(values.device)
    best = torch.full((len(values), block_format.blocks(columns)), torch.inf, device=values.device)
    chosen = torch.zeros_like(best, dtype=torch.uint8)
    for book in range(block_format.codebooks):
        misses = scaled - words[:, book][places]
        squares = pad(misses * misses, (0, missing)).unflatten(-1, shape)
        errors = squares[..., 0]
        for place in range(1, block_format.block):
            errors = errors + squares[..., place]
        smaller = errors < best
        best = torch.where(smaller, errors, best)
        chosen = chosen.masked_fill(smaller, book)
    selectors = spread(chosen.long(), block_format.block, columns)
    return all_codes.reshape(-1)[places * block_format.codebooks + selectors], chosen


@cache
def _gpu_kernel() -> ModuleType | None:
    """Return what rounds on a GPU, or None without Triton."""
    try:
        from claq_exp.number_formats import block_rounding
    except ImportError:
        return None
    return block_rounding


def _wide(steps: Tensor, grid: FormatCodebooks, columns: int) -> Tensor:
    return spread(steps, grid.format.array, columns)


def _sizes(grid: FormatCodebooks, columns: int) -> tuple[int, int, int]:
    """Return the offset of places, the numbers of an array, and of a block (0: one codebook)."""
    block_format = grid.format
    block = block_format.block if block_format.codebooks > 1 else 0
    return grid.table.offset, min(block_format.array or columns, columns), block


def _side_by_side(work: Callable[[slice], None], rows: int, columns: int) -> None:
    """Do the work on rows, in as many threads as torch uses."""
    threads = min(torch.get_num_threads(), max(1, rows * columns // LEAST_NUMBERS), max(rows, 1))
    step = -(-rows // threads)
    parts = [slice(start, start + step) for start in range(0, rows, step)]
    if len(parts) <= 1:
        for part in parts:
            work(part)
        return
    pending = [_pool(len(parts)).submit(work, part) for part in parts[1:]]
    work(parts[0])
    for done in pending:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="number_formats")


os.register_at_fork(after_in_child=_pool.cache_clear)
