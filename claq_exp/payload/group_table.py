"""The form `group_table`: a table of levels per code width, a scale per output row and group.

w = scale * table[code].  The columns of a group have one width.  llama.cpp's IQ4_NL is of
this kind, with a table that is always the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.payload.base import Layout, half, whole_numbers, wide
from claq_exp.payload.columns import (
    ColumnLayout,
    ColumnPayload,
    Lookups,
    bands,
    coded_tensors,
)
from claq_exp.payload.operand import RowScales
from claq_exp.payload.packing import pack, unpack
from claq_exp.payload.stored import HALF, StoredTensor

SCALE_BITS = (4, 5, 6, 7, 8, HALF)  # of the scale of a group; less than 16 under a row scale


@dataclass(frozen=True, kw_only=True)
class GroupTableLayout(ColumnLayout):
    """The layout of tables and scales.

    group_size: columns of one width that share a scale of a row.
    scale_bits: of a group's scale: 16, a float16; or 4 to 8, a signed integer times a row scale.
    """

    kind: ClassVar[str] = "group_table"

    group_size: int
    scale_bits: int = HALF

    def __post_init__(self) -> None:
        """Raise CheckpointError for numbers that do not fit each other."""
        super().__post_init__()
        whole_numbers(self.group_size, self.scale_bits)
        if self.group_size < 1:
            raise CheckpointError("a group table has a positive group size")
        if self.scale_bits not in SCALE_BITS:
            raise CheckpointError(f"a group table has no scales of {self.scale_bits} bits")

    @property
    def groups(self) -> int:
        """Groups of columns."""
        return sum(-(-columns // self.group_size) for columns in self.columns_per_width.values())

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return codes and reserved entries, the tables, and the scale of each row and group."""
        tensors = coded_tensors(self)
        entries = sum(2**width for width in self.columns_per_width)
        tensors["table"] = StoredTensor("F16", (entries,), "codebooks")
        if self.scale_bits == HALF:
            tensors["scales"] = StoredTensor("F16", (self.rows, self.groups), "scales")
        else:
            count = self.rows * self.groups
            tensors["row_scales"] = StoredTensor("F16", (self.rows,), "scales")
            tensors["scale_codes"] = StoredTensor.of_integers((), count, self.scale_bits, "scales")
        return tensors

    def describe(self) -> str:
        """Return what codes stand for in a few words."""
        return f"table, scales of {self.scale_bits} bits, {self.group_size} columns"


@dataclass(frozen=True)
class RowIntegers:
    """Scales under a scale of their row: row_scales times integers.

    row_scales: [out] float16.  integers: [out, groups] int16, of `bits` bits with their sign.
    """

    row_scales: Tensor
    integers: Tensor
    bits: int

    @staticmethod
    def near(scales: Tensor, bits: int, kept: Tensor | None = None) -> RowIntegers:
        """Return what is nearest to scales [out, groups].

        kept: row scales [out] float16 for the rows whose scales they reach; the others, and all
        without it, take the least that reach.
        """
        scales = scales.detach().float()
        top = 2 ** (bits - 1) - 1
        rows = (scales.abs().amax(dim=1) / top).half()
        if kept is not None:
            reach = kept.float() * (top + 0.5)
            above, below = scales.amax(dim=1), -scales.amin(dim=1)
            rows = torch.where((above <= reach) & (below <= reach + kept.float()), kept, rows)
        step = rows.float()[:, None]
        integers = torch.where(step > 0, scales / torch.where(step > 0, step, 1.0), 0.0)
        return RowIntegers(rows, integers.round().clamp(-top - 1, top).short(), bits)

    def scales(self) -> Tensor:
        """Return what they stand for: [out, groups] float32."""
        return self.row_scales.float()[:, None] * self.integers

    def pack(self) -> dict[str, Tensor]:
        """Return the stored tensors."""
        above = self.integers.reshape(-1).int() + 2 ** (self.bits - 1)
        return {"row_scales": self.row_scales, "scale_codes": pack(above, self.bits)}

    @staticmethod
    def unpack(layout: GroupTableLayout, tensors: Mapping[str, Tensor]) -> RowIntegers:
        """Undo `pack`."""
        bits = layout.scale_bits
        above = unpack(tensors["scale_codes"], bits, layout.rows * layout.groups)
        integers = (above - 2 ** (bits - 1)).short().reshape(layout.rows, layout.groups)
        return RowIntegers(tensors["row_scales"], integers, bits)


class Grouped(NamedTuple):
    """The table and the group of each column.

    widths: the code widths in use, ascending.  which: [in] int64, the width of each column among
    them.  starts: [widths] int64, where the table of a width begins.  group_of: [in] int64; the
    groups of the narrowest width come first.
    """

    widths: list[int]
    which: Tensor
    starts: Tensor
    group_of: Tensor

    @staticmethod
    def of(column_bits: Tensor, group_size: int) -> Grouped:
        """Group neighbours among the columns of each width: [in] uint8."""
        widths, which = torch.unique(column_bits, return_inverse=True)
        entries = 2 ** widths.long()
        group_of = torch.empty_like(which)
        first = 0
        for number in range(len(widths)):
            own = torch.nonzero(which == number).flatten()
            groups = torch.arange(len(own), device=own.device) // group_size
            group_of[own] = first + groups
            first += int(groups[-1]) + 1
        return Grouped(widths.tolist(), which, entries.cumsum(0) - entries, group_of)


@dataclass(frozen=True)
class GroupTable(ColumnPayload):
    """A matrix of levels out of the table of each column's width, times scales.

    table: [sum of 2**bits over the widths] float16, the tables one after the other, the narrowest
        first.
    scales: [out, groups] float16, or float32 where `by_row` has them.
    group_size: neighbours among the columns of one width that share a scale.
    by_row: what is stored of scales of fewer than 16 bits, or None.
    """

    kind: ClassVar[str] = GroupTableLayout.kind
    layout_class: ClassVar[type[Layout]] = GroupTableLayout

    table: Tensor
    scales: Tensor
    group_size: int
    by_row: RowIntegers | None = None

    def layout(self) -> GroupTableLayout:
        """Describe how this matrix is stored."""
        return GroupTableLayout.of(
            *(self.shape[0], self.column_bits, self.reserved.counts),
            group_size=self.group_size,
            scale_bits=HALF if self.by_row is None else self.by_row.bits,
        )

    def trainable(self) -> dict[str, Tensor]:
        """Return `table` and `scales`, and what the base has."""
        return {"table": self.table, "scales": self.scales} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        table, scales = values.get("table", self.table), values.get("scales", self.scales)
        return replace(super().with_values(values), table=table, scales=scales)

    def rebuilt(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers, rounded to what is stored; see Payload."""
        if self.by_row is None or "scales" not in values:
            return super().rebuilt(values)
        others = {name: given for name, given in values.items() if name != "scales"}
        half("scales", values["scales"])  # refuses what is not finite
        near = RowIntegers.near(values["scales"], self.by_row.bits, self.by_row.row_scales)
        return replace(super().rebuilt(others), scales=near.scales(), by_row=near)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        table, scales = wide(self.table), wide(self.scales)
        grouped = Grouped.of(self.column_bits, self.group_size)
        starts = grouped.starts[grouped.which]
        for columns in bands(self.shape[1]):
            levels = table[self.codes[:, columns].long() + starts[columns]]
            yield columns, levels * scales[:, grouped.group_of[columns]]

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        if self.by_row is None:
            return {"table": self.table, "scales": self.scales.contiguous()}
        if not torch.equal(self.by_row.scales(), self.scales):
            raise ValueError("these scales are not rounded to what is stored; see `rebuilt`")
        return {"table": self.table} | self.by_row.pack()

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        own = {"table": tensors["table"], "group_size": layout.group_size}
        if layout.scale_bits == HALF:
            return own | {"scales": tensors["scales"]}
        by_row = RowIntegers.unpack(layout, tensors)
        return own | {"scales": by_row.scales(), "by_row": by_row}

    def _lookups(self, device: torch.device) -> Lookups:
        scales, table = self.scales.float(), self.table.float()
        widest = float(scales.abs().max() * table.abs().max())
        grouped = Grouped.of(self.column_bits, self.group_size)
        grid = RowScales(scales, None, self.group_size, grouped.group_of)
        # what lies behind a column's own table belongs to the next one, and no code reaches it
        reach = torch.arange(2 ** grouped.widths[-1])
        places = grouped.starts[grouped.which, None] + reach
        return Lookups(widest, table[places.clamp(max=len(table) - 1)], grid=grid)
