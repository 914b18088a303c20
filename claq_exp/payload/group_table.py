"""The form `group_table`: a table of levels for the matrix, a scale per output row and group.

w = scale * table[code].  llama.cpp's IQ4_NL is of this kind, with a table that is always the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

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
    """The layout of a table and scales.

    group_size: columns that share a scale of a row.
    scale_bits: of a group's scale: 16, a float16; or 4 to 8, a signed integer times a row scale.
    """

    kind: ClassVar[str] = "group_table"

    group_size: int
    scale_bits: int = HALF

    def __post_init__(self) -> None:
        """Raise CheckpointError for numbers that do not fit each other."""
        super().__post_init__()
        whole_numbers(self.group_size, self.scale_bits)
        if len(self.columns_per_width) != 1 or self.group_size < 1:
            raise CheckpointError("a group table has one code width and a positive group size")
        if self.scale_bits not in SCALE_BITS:
            raise CheckpointError(f"a group table has no scales of {self.scale_bits} bits")

    @property
    def bits(self) -> int:
        """The one width of codes."""
        return min(self.columns_per_width)

    @property
    def groups(self) -> int:
        """Groups of columns."""
        return -(-self.columns // self.group_size)

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return codes and reserved entries, the table, and the scale of each row and group."""
        tensors = coded_tensors(self)
        tensors["table"] = StoredTensor("F16", (2**self.bits,), "codebooks")
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


@dataclass(frozen=True)
class GroupTable(ColumnPayload):
    """A matrix of levels out of one table, times scales; all columns have one width.

    table: [2**bits] float16.  scales: [out, groups] float16, or float32 where `by_row` has them.
    group_size: columns that share a scale.
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
        for columns in bands(self.shape[1]):
            places = torch.arange(columns.start, columns.stop, device=self.codes.device)
            levels = table[self.codes[:, columns].long()]
            yield columns, levels * scales[:, places // self.group_size]

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
        grid = RowScales(scales, None, self.group_size)
        return Lookups(widest, table.expand(self.shape[1], len(table)), grid=grid)
