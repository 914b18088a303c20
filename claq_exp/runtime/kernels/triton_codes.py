"""Codes read from packed words and turned into levels, inside Triton kernels."""

# ruff: noqa: PLR0913, PLR0917, RUF005
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

WARP = tl.constexpr(32)


@triton.jit
def _code_at(words, width: tl.constexpr, position: tl.constexpr):
    """Return code number `position` of a run, given the words of the run."""
    first: tl.constexpr = position * width // 32
    shift: tl.constexpr = position * width % 32
    code = words[first] >> shift
    if shift + width > 32:
        code |= words[first + 1] << (32 - shift)
    return (code & (2**width - 1)).to(tl.int32)


@triton.jit
def joint_codes(words, width: tl.constexpr, joined: tl.constexpr):
    """Join the codes of `joined` columns row by row; words: one word of each column.

    Returns 32 / width indices below 2**(joined * width), one per row.
    """
    size: tl.constexpr = joined * width
    every: tl.constexpr = ((1 << 32) - 1) // (2**size - 1) * (2**width - 1)
    codes = ()
    for position in tl.static_range(32 // width):
        index = (words[0] >> (position % joined * width)) & every
        for column in tl.static_range(1, joined):
            own = (words[column] >> (position % joined * width)) & every
            index |= own << (column * width)
        index = (index >> (position // joined * size)) & (2**size - 1)
        codes = codes + (index.to(tl.int32),)
    return codes


@triton.jit
def read_words(codes_ptr, column, last, word, pitch, joined: tl.constexpr, words: tl.constexpr):
    """Return the `words` words from `word` [1, 32] on of `joined` columns from `column` on."""
    read = ()
    for neighbour in tl.static_range(joined):
        own = (column + neighbour)[:, None]
        for i in tl.static_range(words):
            inside = (own < last) & (word + i < pitch)
            found = tl.load(codes_ptr + own * pitch + word + i, mask=inside, other=0)
            read = read + (found.to(tl.uint32, bitcast=True),)
    return read


@triton.jit
def level_table(levels_ptr, column, last, width: tl.constexpr, skipped: tl.constexpr):
    """Return the levels of columns [lanes] by lane of a warp: [lanes, 32] float32.

    The level of a lane is that of the bits of its number from `skipped` on, so that the table
    repeats itself to fill the warp.
    """
    code = (tl.arange(0, WARP) >> skipped) & (2**width - 1)
    level = tl.broadcast_to(code.to(tl.float32)[None, :], [column.shape[0], WARP])
    if levels_ptr is not None:
        at = column[:, None] * (2**width) + code[None, :]
        level = tl.load(levels_ptr + at, mask=(column < last)[:, None], other=0.0)
    return level


@triton.jit
def run_levels(
    codes_ptr,
    levels_ptr,
    row_levels_ptr,
    table,
    column,
    last,
    run,
    runs,
    pitch,
    width: tl.constexpr,
    words: tl.constexpr,
    run_rows: tl.constexpr,
):
    """Return the levels of the rows of a run [32], `run_rows` tensors [lanes, 32] float32."""
    word = run[None, :] * words
    read = read_words(codes_ptr, column, last, word, pitch, 1, words)
    levels = ()
    for position in tl.static_range(run_rows):
        code = _code_at(read, width, position)
        if table is not None:
            level = tl.gather(table, code, 1)
        elif row_levels_ptr is not None:
            at = (position * 2**width + code) * runs + run[None, :]
            inside = (column < last)[:, None] & (run < runs)[None, :]
            level = tl.load(row_levels_ptr + at, mask=inside, other=0.0)
        elif levels_ptr is None:
            level = code.to(tl.float32)
        else:
            at = column[:, None] * (2**width) + code
            level = tl.load(levels_ptr + at, mask=(column < last)[:, None], other=0.0)
        levels = levels + (level,)
    return levels
