"""A small matrix of every stored form and of every variant of one, of random numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from claq_exp.number_formats.formats import E2M1, INTEGER, LEARNED, BlockFormat
from claq_exp.number_formats.level_sets import level_set
from claq_exp.number_formats.levels import encode_weight
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.payload import (
    BlockCodes,
    ColumnCodebooks,
    GroupTable,
    RealGrid,
    RowCodebooks,
    RowGrid,
    SharedCodebooks,
    SignScales,
    SnappedCodebooks,
)
from claq_exp.payload.base import Payload
from claq_exp.payload.columns import Reserved
from claq_exp.payload.group_table import RowIntegers

ROWS, COLUMNS = 13, 10
Coded = tuple[Tensor, Tensor, Reserved]


def normal(dice: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=dice).half()


def coded(dice: torch.Generator, widths: tuple[int, ...], share: float) -> Coded:
    """Codes, widths that columns take in turn, and a share of reserved entries."""
    bits = torch.tensor([widths[i % len(widths)] for i in range(COLUMNS)], dtype=torch.uint8)
    codes = (torch.rand(ROWS, COLUMNS, generator=dice) * 2.0**bits).to(torch.uint8)
    taken = torch.rand(COLUMNS, ROWS, generator=dice) < share
    columns, rows = taken.nonzero(as_tuple=True)
    codes[rows, columns] = 0
    return codes, bits, Reserved(taken.sum(1), rows, 10 * normal(dice, len(rows)))


def own(dice: torch.Generator, widths: tuple[int, ...], share: float, scaled: bool) -> Payload:
    codes, bits, reserved = coded(dice, widths, share)
    values = normal(dice, COLUMNS, 2 ** max(widths))
    values[torch.arange(values.shape[1]) >= 2 ** bits[:, None].int()] = 0
    scales = normal(dice, ROWS) if scaled else None
    return ColumnCodebooks(codes, bits, reserved, values, scales)


def shared(dice: torch.Generator, widths: tuple[int, ...], share: float, scaled: bool) -> Payload:
    books = {width: normal(dice, 2**width).sort().values for width in widths}
    scales = normal(dice, ROWS) if scaled else None
    return SharedCodebooks(
        *coded(dice, widths, share), books, normal(dice, COLUMNS, 2), row_scales=scales
    )


def snapped(dice: torch.Generator, widths: tuple[int, ...], bits: int, scaled: bool) -> Payload:
    parts = coded(dice, widths, 0.2 if scaled else 0.0)
    known = len(level_set("apot", bits))
    indices = torch.randint(known, (COLUMNS, 2 ** max(widths)), generator=dice)
    indices[torch.arange(indices.shape[1]) >= 2 ** parts[1][:, None].int()] = 0
    scales = normal(dice, ROWS) if scaled else None
    return SnappedCodebooks(
        *parts, indices.to(torch.uint8), normal(dice, COLUMNS), "apot", bits, scales
    )


def by_row(dice: torch.Generator, width: int, share: float) -> Payload:
    return RowCodebooks(*coded(dice, (width,), share), normal(dice, ROWS, 2**width))


def grid(dice: torch.Generator, width: int, group_size: int, share: float) -> Payload:
    groups = -(-COLUMNS // group_size)
    zeros = torch.randint(2**width, (ROWS, groups), generator=dice).to(torch.uint8)
    scales = normal(dice, ROWS, groups).abs() + 0.1
    return RowGrid(*coded(dice, (width,), share), scales, zeros, group_size)


def real_grid(dice: torch.Generator, width: int, group_size: int, share: float) -> Payload:
    groups = -(-COLUMNS // group_size)
    zeros, scales = 3 * normal(dice, ROWS, groups), normal(dice, ROWS, groups).abs() + 0.1
    return RealGrid(*coded(dice, (width,), share), scales, zeros, group_size)


def table(dice: torch.Generator, widths: tuple[int, ...], group_size: int, share: float) -> Payload:
    codes, bits, reserved = coded(dice, widths, share)
    levels = torch.cat([normal(dice, 2**width).sort().values for width in widths])
    counts = torch.unique(bits, return_counts=True)[1].tolist()
    scales = normal(dice, ROWS, sum(-(-count // group_size) for count in counts))
    return GroupTable(codes, bits, reserved, levels, scales, group_size)


def scaled_table(dice: torch.Generator, width: int, bits: int, share: float) -> Payload:
    levels, rows = normal(dice, 2**width).sort().values, normal(dice, ROWS).abs()
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (ROWS, 3), generator=dice)
    by_row = RowIntegers(rows, integers.short(), bits)
    return GroupTable(*coded(dice, (width,), share), levels, by_row.scales(), 4, by_row)


def blocks(dice: torch.Generator, form: BlockFormat) -> Payload:
    weight = torch.randn(ROWS, COLUMNS, generator=dice)
    if form.codewords != LEARNED:
        return BlockCodes.of(*encode_weight(weight, FormatCodebooks.fixed(form)))
    top = 2 ** (form.codeword_bits - 1)
    books = torch.randint(-top, top, (form.codebooks, 2**form.bits), generator=dice)
    return BlockCodes.of(
        *encode_weight(weight, FormatCodebooks(form, books.float().sort(dim=1).values))
    )


def signs(dice: torch.Generator) -> Payload:
    codes, _, _ = coded(dice, (1,), 0.0)
    return SignScales.of(codes, normal(dice, COLUMNS), normal(dice, ROWS))


BUILD: dict[str, Callable[[torch.Generator], Payload]] = {
    "own": lambda dice: own(dice, (3,), 0.0, False),
    "own, mixed, scaled, reserved": lambda dice: own(dice, (2, 4, 1), 0.2, True),
    "shared": lambda dice: shared(dice, (2,), 0.0, False),
    "shared, mixed, scaled, reserved": lambda dice: shared(dice, (3, 1), 0.2, True),
    "snapped": lambda dice: snapped(dice, (3,), 7, False),
    "snapped, mixed, scaled, reserved": lambda dice: snapped(dice, (2, 4, 1), 6, True),
    "grid": lambda dice: grid(dice, 4, 10, 0.0),
    "grid in groups, reserved": lambda dice: grid(dice, 3, 4, 0.2),
    "real zeros": lambda dice: real_grid(dice, 4, 10, 0.0),
    "real zeros in groups, reserved": lambda dice: real_grid(dice, 2, 4, 0.2),
    "table": lambda dice: table(dice, (4,), 10, 0.0),
    "table in groups, reserved": lambda dice: table(dice, (3,), 4, 0.2),
    "tables of several widths, reserved": lambda dice: table(dice, (1, 3, 4), 4, 0.2),
    "table, 6-bit scales": lambda dice: scaled_table(dice, 4, 6, 0.0),
    "table, 5-bit scales, reserved": lambda dice: scaled_table(dice, 1, 5, 0.2),
    "lo_bcq": lambda dice: blocks(dice, BlockFormat(2, 8, "e4m3", LEARNED, 4, 3, 5)),
    "lo_bcq, inverse": lambda dice: blocks(
        dice, BlockFormat(3, 4, "e4m3_inverse", LEARNED, 2, 1, 6)
    ),
    "mxfp4": lambda dice: blocks(dice, BlockFormat(4, 4, "e8m0", E2M1)),
    "nvfp4": lambda dice: blocks(dice, BlockFormat(4, 4, "e4m3", E2M1)),
    "vsq": lambda dice: blocks(dice, BlockFormat(3, 4, "integer", INTEGER)),
    "signs": signs,
    "row codebooks": lambda dice: by_row(dice, 2, 0.0),
    "row codebooks, reserved": lambda dice: by_row(dice, 3, 0.2),
}
SAMPLES = {
    name: build(torch.Generator().manual_seed(number))
    for number, (name, build) in enumerate(BUILD.items())
}
