"""The forms `row_grid` and `real_grid`: a uniform grid per output row and group of columns.

w = scale * (code - zero), where the zero is a code (GPTQ, round to nearest) or any number (NeUQI).
"""

from __future__ import annotations

from abc import abstractmethod
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
class GridLayout(ColumnLayout):
    """What layouts of grids share.  group_size: columns that share a grid of a row."""

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

    @abstractmethod
    def zeros(self) -> StoredTensor:
        """Return how zeros are stored."""

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return codes and reserved entries, and a scale and zero of each grid."""
        scales = StoredTensor("F16", (self.rows, self.groups), "scales")
        return coded_tensors(self) | {"scales": scales, "zeros": self.zeros()}


@dataclass(frozen=True, kw_only=True)
class RowGridLayout(GridLayout):
    """The layout of grids whose zeros are codes."""

    kind: ClassVar[str] = "row_grid"

    def zeros(self) -> StoredTensor:
        """Return the zero codes of all grids."""
        return StoredTensor.of_integers((), self.rows * self.groups, self.bits, "scales")

    def describe(self) -> str:
        """Return what codes stand for in a few words."""
        return f"row grid, {self.group_size} columns"


@dataclass(frozen=True, kw_only=True)
class RealGridLayout(GridLayout):
    """The layout of grids whose zeros are numbers."""

    kind: ClassVar[str] = "real_grid"

    def zeros(self) -> StoredTensor:
        """Return a float16 for each grid."""
        return StoredTensor("F16", (self.rows, self.groups), "scales")

    def describe(self) -> str:
        """Return what codes stand for in a few words."""
        return f"row grid with real zeros, {self.group_size} columns"


@dataclass(frozen=True)
class Grid(ColumnPayload):
    """The base of matrices on row grids; all columns have one width.

    scales: [out, groups] float16.  zeros: [out, groups].  group_size: columns of a grid.
    """

    scales: Tensor
    zeros: Tensor
    group_size: int

    def layout(self) -> Any:
        """Describe how this matrix is stored."""
        kind: Any = self.layout_class
        return kind.of(
            self.shape[0], self.column_bits, self.reserved.counts, group_size=self.group_size
        )

    def trainable(self) -> dict[str, Tensor]:
        """Return `scales`, and what the base has."""
        return {"scales": self.scales} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        return replace(super().with_values(values), scales=values.get("scales", self.scales))

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        scales, zeros = wide(self.scales), wide(self.zeros)
        for columns in bands(self.shape[1]):
            places = torch.arange(columns.start, columns.stop, device=self.codes.device)
            group = places // self.group_size
            steps = self.codes[:, columns].float() - zeros[:, group]
            yield columns, steps * scales[:, group]

    def _lookups(self, device: torch.device) -> Lookups:
        scales, zeros = self.scales.float(), self.zeros.float()
        top = 2.0 ** int(self.column_bits[0]) - 1
        widest = float((scales.abs() * torch.maximum(zeros.abs(), (top - zeros).abs())).max())
        group_of = torch.arange(self.shape[1]) // self.group_size
        return Lookups(widest, grid=RowScales(scales, zeros, self.group_size, group_of))


@dataclass(frozen=True)
class RowGrid(Grid):
    """A matrix on row grids whose zeros are codes: [out, groups] uint8."""

    kind: ClassVar[str] = RowGridLayout.kind
    layout_class: ClassVar[type[Layout]] = RowGridLayout

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


@dataclass(frozen=True)
class RealGrid(Grid):
    """A matrix on row grids whose zeros are numbers: [out, groups] float16."""

    kind: ClassVar[str] = RealGridLayout.kind
    layout_class: ClassVar[type[Layout]] = RealGridLayout

    def trainable(self) -> dict[str, Tensor]:
        """Return `zeros`, and what the base has."""
        return {"zeros": self.zeros} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        return replace(super().with_values(values), zeros=values.get("zeros", self.zeros))

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {"scales": self.scales.contiguous(), "zeros": self.zeros.contiguous()}

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        own = {name: tensors[name] for name in ("scales", "zeros")}
        return own | {"group_size": layout.group_size}
