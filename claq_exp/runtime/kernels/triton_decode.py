"""Products with packed codes as Triton kernels.

Codes of a column lie along the rows, so lanes of a warp are rows of one column: its words are read
in one piece, and its few levels fit the registers of the warp, one per lane.  A level is looked up
by a warp shuffle: 32 per clock of a multiprocessor, and no address to compute.  What limits a small
batch is the issue of instructions, not memory: at 2 bits the memory of an H200 delivers 85 codes
per clock and multiprocessor, while shift, mask, shuffle and addition of one code per lane let 32
through.  Narrow codes of neighbouring columns are therefore joined into one index of a table of the
sums of their products, and one shuffle and one addition do for all of them.

Every sum has a fixed order: programs that share a row write apart, and `finish` adds them up.
"""

# ruff: noqa: PLR0913, PLR0917, RUF005
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from claq_exp.runtime.kernels.triton_codes import (
    WARP,
    joint_codes,
    level_table,
    read_words,
    run_levels,
)


@triton.jit
def _joined_halves(values, half: tl.constexpr):
    """Join value i with value half + i."""
    joined = ()
    for index in tl.static_range(half):
        joined = joined + (tl.join(values[index], values[half + index]),)
    return joined


@triton.jit
def _stacked(values, count: tl.constexpr):
    """Return `count` (a power of two) tensors [lanes, runs] as one: [lanes, runs, count]."""
    shape: tl.constexpr = (values[0].shape[0], values[0].shape[1], count)
    for level in tl.static_range(1, count.bit_length()):
        values = _joined_halves(values, count >> level)
    return tl.reshape(values[0], shape)


@triton.jit
def _span(k, block, per_block, span):
    """Return the columns [first, last) of this program: its share of a block of columns."""
    split = tl.program_id(1)
    start = split // per_block * block
    first = start + split % per_block * span
    return first, tl.minimum(tl.minimum(first + span, start + block), k)


@triton.jit
def _place_of(columns_ptr, column, last):
    """Return the places of columns of a part among the inputs."""
    place = column
    if columns_ptr is not None:
        place = tl.load(columns_ptr + column, mask=column < last, other=0)
    return place


@triton.jit
def _store_sums(
    total, partial_ptr, split, n, rows, run, batch: tl.constexpr, run_rows: tl.constexpr
):
    """Add up lanes and store the sums of runs [32]; total: by row of a run, then by input."""
    row = run[:, None] * run_rows + tl.arange(0, run_rows)[None, :]
    for b in tl.static_range(batch):
        own = ()
        for position in tl.static_range(run_rows):
            own = own + (total[position * batch + b],)
        value = tl.sum(_stacked(own, run_rows), axis=0)
        here = (split * n + b).to(tl.int64) * rows
        tl.store(partial_ptr + here + row, value, mask=row < tl.where(b < n, rows, 0))


@triton.jit(do_not_specialize=["n", "block", "per_block", "span", "first_split"])
def sum_lookups(
    inputs_ptr,
    columns_ptr,
    codes_ptr,
    levels_ptr,
    row_levels_ptr,
    partial_ptr,
    n,
    size,
    k,
    rows,
    row_runs,
    pitch,
    block,
    per_block,
    span,
    first_split,
    width: tl.constexpr,
    words: tl.constexpr,
    run_rows: tl.constexpr,
    lanes: tl.constexpr,
    unroll: tl.constexpr,
    batch: tl.constexpr,
):
    """Sum levels times inputs over a share of the columns of one width, for few inputs.

    Program (r, s): 32 runs of rows, share s of the columns, all n <= `batch` inputs.  A run is the
    fewest rows whose codes fill whole words (`run_rows` in `words`); a thread owns a run and walks
    every `lanes`-th column.
    inputs: [n, size].  columns: [k] int32 or None.  codes: [k, pitch] int32.  levels:
    [k, 2**width] float32, or None where a code is its own level.  row_levels: [run_rows, 2**width,
    row_runs] float32, levels of rows in place of both, or None.  partial: [splits, n, rows]
    float32, written from split `first_split` on.
    """
    run = tl.program_id(0) * WARP + tl.arange(0, WARP)
    first, last = _span(k, block, per_block, span)
    total = (tl.zeros([lanes, WARP], tl.float32),) * (run_rows * batch)
    for step in tl.range(first, last, lanes, loop_unroll_factor=unroll):
        column = step + tl.arange(0, lanes)
        place = _place_of(columns_ptr, column, last)
        table = None
        if width <= 5 and levels_ptr is not None:
            table = level_table(levels_ptr, column, last, width, 0)
        levels = run_levels(
            codes_ptr,
            levels_ptr,
            row_levels_ptr,
            table,
            column,
            last,
            run,
            row_runs,
            pitch,
            width,
            words,
            run_rows,
        )
        factors = ()
        for b in tl.static_range(batch):
            inside = column < tl.where(b < n, last, 0)
            x = tl.load(inputs_ptr + b * size + place, mask=inside, other=0.0)
            factors = factors + (x.to(tl.float32)[:, None],)
        summed = ()
        for position in tl.static_range(run_rows):
            for b in tl.static_range(batch):
                before = total[position * batch + b]
                summed = summed + (before + factors[b] * levels[position],)
        total = summed
    split = first_split + tl.program_id(1)
    _store_sums(total, partial_ptr, split, n, rows, run, batch, run_rows)


@triton.jit(do_not_specialize=["n", "block", "per_block", "span", "first_split"])
def sum_joint_lookups(
    inputs_ptr,
    columns_ptr,
    codes_ptr,
    levels_ptr,
    row_levels_ptr,
    partial_ptr,
    n,
    size,
    k,
    rows,
    row_runs,
    pitch,
    block,
    per_block,
    span,
    first_split,
    width: tl.constexpr,
    words: tl.constexpr,
    run_rows: tl.constexpr,
    lanes: tl.constexpr,
    unroll: tl.constexpr,
    batch: tl.constexpr,
    joined: tl.constexpr,
    runs: tl.constexpr,
):
    """As `sum_lookups`, for codes of 1 or 2 bits: `joined` neighbouring columns at once.

    A lane looks up the sum of the products of its columns, in a table for each input.  A thread
    owns `runs` runs, so that the tables pay.
    """
    run = tl.program_id(0) * (WARP * runs) + tl.arange(0, WARP)
    first, last = _span(k, block, per_block, span)
    total = (tl.zeros([lanes, WARP], tl.float32),) * (runs * run_rows * batch)
    for step in tl.range(first, last, lanes * joined, loop_unroll_factor=unroll):
        column = step + tl.arange(0, lanes) * joined
        tables = (tl.zeros([lanes, WARP], tl.float32),) * batch
        for neighbour in tl.static_range(joined):
            own = column + neighbour
            place = _place_of(columns_ptr, own, last)
            level = level_table(levels_ptr, own, last, width, neighbour * width)
            grown = ()
            for b in tl.static_range(batch):
                inside = own < tl.where(b < n, last, 0)
                x = tl.load(inputs_ptr + b * size + place, mask=inside, other=0.0)
                grown = grown + (tables[b] + x.to(tl.float32)[:, None] * level,)
            tables = grown
        summed = ()
        for r in tl.static_range(runs):
            word = (run + r * WARP)[None, :]
            read = read_words(codes_ptr, column, last, word, pitch, joined, 1)
            codes = joint_codes(read, width, joined)
            for position in tl.static_range(run_rows):
                for b in tl.static_range(batch):
                    before = total[(r * run_rows + position) * batch + b]
                    summed = summed + (before + tl.gather(tables[b], codes[position], 1),)
        total = summed
    split = first_split + tl.program_id(1)
    for r in tl.static_range(runs):
        own = ()
        for index in tl.static_range(run_rows * batch):
            own = own + (total[r * run_rows * batch + index],)
        _store_sums(own, partial_ptr, split, n, rows, run + r * WARP, batch, run_rows)


@triton.jit(do_not_specialize=["n", "block", "per_block", "span", "first_split"])
def sum_tiles(
    inputs_ptr,
    columns_ptr,
    codes_ptr,
    levels_ptr,
    row_levels_ptr,
    partial_ptr,
    n,
    size,
    k,
    rows,
    row_runs,
    pitch,
    block,
    per_block,
    span,
    first_split,
    width: tl.constexpr,
    words: tl.constexpr,
    run_rows: tl.constexpr,
    lanes: tl.constexpr,
    unroll: tl.constexpr,
    batch: tl.constexpr,
    precision: tl.constexpr,
    narrow: tl.constexpr,
):
    """As `sum_lookups`, but levels meet the inputs on tensor cores, `lanes` columns at a time.

    narrow: multiply in float16, for inputs and levels that it holds.
    """
    run = tl.program_id(0) * WARP + tl.arange(0, WARP)
    b = tl.arange(0, batch)
    first, last = _span(k, block, per_block, span)
    total = tl.zeros([batch, WARP * run_rows], tl.float32)
    for step in tl.range(first, last, lanes, loop_unroll_factor=unroll):
        column = step + tl.arange(0, lanes)
        place = _place_of(columns_ptr, column, last)
        table = None
        if width <= 5 and levels_ptr is not None:
            table = level_table(levels_ptr, column, last, width, 0)
        levels = run_levels(
            codes_ptr,
            levels_ptr,
            row_levels_ptr,
            table,
            column,
            last,
            run,
            row_runs,
            pitch,
            width,
            words,
            run_rows,
        )
        tile = tl.reshape(_stacked(levels, run_rows), [lanes, WARP * run_rows])
        inside = (b < n)[:, None] & (column < last)[None, :]
        x = tl.load(inputs_ptr + b[:, None] * size + place[None, :], mask=inside, other=0.0)
        if narrow:
            tile = tile.to(tl.float16)
        else:
            x = x.to(tl.float32)
        total = tl.dot(x, tile, total, input_precision=precision)
    row = tl.program_id(0) * (WARP * run_rows) + tl.arange(0, WARP * run_rows)
    here = ((first_split + tl.program_id(1)) * n + b).to(tl.int64)[:, None] * rows
    inside = (b < n)[:, None] & (row < rows)[None, :]
    tl.store(partial_ptr + here + row[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["n", "splits"])
def finish(
    partial_ptr,
    inputs_ptr,
    row_scales_ptr,
    grid_scales_ptr,
    offsets_ptr,
    group_sums_ptr,
    starts_ptr,
    places_ptr,
    changes_ptr,
    outputs_ptr,
    n,
    size,
    rows,
    splits,
    split_groups_ptr,
    groups,
    height: tl.constexpr,
    depth: tl.constexpr,
):
    """Add up partial sums, scale them, and add what reserved entries change.

    Program (r, b): `height` rows of input b.  partial: [splits, n, rows] float32.  inputs:
    [n, size].  row_scales: [rows] float32 or None.  grid_scales: [groups, rows] float32 or None;
    split_groups: [splits] int32 then, the group of each partial sum.
    offsets: scale * zero alike, or None; group_sums: [n, groups] float32, sums of the inputs.
    starts: [rows + 1] int32 or None, the entries of a row in places (int32, columns) and changes
    (float32).  outputs: [n, rows], written.
    """
    row = tl.program_id(0) * height + tl.arange(0, height)
    b = tl.program_id(1)
    part = tl.arange(0, depth)
    total = tl.zeros([height], tl.float32)
    for begin in range(0, splits, depth):
        split = begin + part
        inside = (split < splits)[:, None] & (row < rows)[None, :]
        at = (split * n + b).to(tl.int64)[:, None] * rows + row[None, :]
        value = tl.load(partial_ptr + at, mask=inside, other=0.0)
        if grid_scales_ptr is not None:
            group = tl.load(split_groups_ptr + split, mask=split < splits, other=0)
            at = group[:, None] * rows + row[None, :]
            value *= tl.load(grid_scales_ptr + at, mask=inside, other=0.0)
        total += tl.sum(value, axis=0)
    if offsets_ptr is not None:
        for begin in range(0, groups, depth):
            group = begin + part
            inside = (group < groups)[:, None] & (row < rows)[None, :]
            at = group[:, None] * rows + row[None, :]
            offset = tl.load(offsets_ptr + at, mask=inside, other=0.0)
            x = tl.load(group_sums_ptr + b * groups + group, mask=group < groups, other=0.0)
            total -= tl.sum(offset * x[:, None], axis=0)
    if row_scales_ptr is not None:
        total *= tl.load(row_scales_ptr + row, mask=row < rows, other=0.0)
    if starts_ptr is not None:
        start = tl.load(starts_ptr + row, mask=row < rows, other=0)
        stop = tl.load(starts_ptr + row + 1, mask=row < rows, other=0)
        changed = tl.zeros([height], tl.float32)
        for begin in range(0, tl.max(stop - start), depth):
            at = start[:, None] + (begin + part)[None, :]
            inside = at < stop[:, None]
            place = tl.load(places_ptr + at, mask=inside, other=0)
            change = tl.load(changes_ptr + at, mask=inside, other=0.0)
            x = tl.load(inputs_ptr + b.to(tl.int64) * size + place, mask=inside, other=0.0)
            changed += tl.sum(change * x.to(tl.float32), axis=1)
        total += changed
    at = b.to(tl.int64) * rows + row
    tl.store(outputs_ptr + at, total.to(outputs_ptr.dtype.element_ty), mask=row < rows)
