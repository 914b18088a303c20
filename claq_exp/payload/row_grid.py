"""The form `row_grid`: a uniform grid per output row and group of columns (GPTQ, round to nearest).

w = scale * (code - zero).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.payload.base import Layout, whole_numbers, wide
from claq_exp.payload.columns import (
    ColumnLayout,
    ColumnPayload,
    Lookups,
    bands,
    coded_tensors,
)
from claq_exp.payload.operand import RowScales
from claq_exp.payload.packing import pack, unpack
from claq_exp.payload.stored import StoredTensor


@dataclass(frozen=True, kw_only=True)
class RowGridLayout(ColumnLayout):
    """The layout of row grids.  group_size: columns that share a grid of a row."""

    kind: ClassVar[str] = "row_grid"

    group_size: int

    def __post_init__(self) -> None:
        """Raise CheckpointError for numbers that do not fit each other."""
        super().__post_init__()
        whole_numbers(self.group_size)
        if len(self.columns_per_width) != 1 or self.group_size < 1:
            raise CheckpointError("a row grid has one code width and a positive group size")

    @property
    def bits(self) -> int:
        """The one width of codes."""
        return min(self.columns_per_width)

    @property
    def groups(self) -> int:
        """Row grids along the input dimension."""
        return -(-self.columns // self.group_size)

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return codes and reserved entries, and a scale and zero code of each grid."""
        grids = self.rows * self.groups
        return coded_tensors(self) | {
            "scales": StoredTensor("F16", (self.rows, self.groups), "scales"),
            "zeros": StoredTensor.of_integers((), grids, self.bits, "scales"),
        }

    def describe(self) -> str:
        """Return what codes stand for in a few words."""
        return f"row grid, {self.group_size} columns"


@dataclass(frozen=True)
class RowGrid(ColumnPayload):
    """A matrix on row grids; all columns have one width.

    scales: [out, groups] float16.  zeros: [out, groups] uint8.  group_size: columns of a grid.
    """

    kind: ClassVar[str] = RowGridLayout.kind
    layout_class: ClassVar[type[Layout]] = RowGridLayout

    scales: Tensor
    zeros: Tensor
    group_size: int

    def layout(self) -> RowGridLayout:
        """Describe how this matrix is stored."""
        return RowGridLayout.of(
            self.shape[0], self.column_bits, self.reserved.counts, group_size=self.group_size
        )

    def trainable(self) -> dict[str, Tensor]:
        """Return `scales`, and what the base has."""
        return {"scales": self.scales} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        return replace(super().with_values(values), scales=values.get("scales", self.scales))

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        scales, zeros = wide(self.scales), self.zeros.float()
        for columns in bands(self.shape[1]):
            places = torch.arange(columns.start, columns.stop, device=self.codes.device)
            group = places // self.group_size
            steps = self.codes[:, columns].float() - zeros[:, group]
            yield columns, steps * scales[:, group]

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        (width,) = columns_of
        zeros = pack(self.zeros.reshape(-1), width)
        return {"scales": self.scales.contiguous(), "zeros": zeros}

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        zeros = unpack(tensors["zeros"], layout.bits, layout.rows * layout.groups)
        zeros = zeros.to(torch.uint8).reshape(layout.rows, layout.groups)
        return {"scales": tensors["scales"], "zeros": zeros, "group_size": layout.group_size}

    def _lookups(self, device: torch.device) -> Lookups:
        scales, zeros = self.scales.float(), self.zeros.float()
        top = 2.0 ** int(self.column_bits[0]) - 1
        widest = float((scales * torch.maximum(zeros, top - zeros)).max())
        return Lookups(widest, grid=RowScales(scales, zeros, self.group_size))
