"""The form `column_codebooks`: a codebook for each input column (CLAQ, arXiv 2405.17233)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from claq_exp.payload.base import Layout, wide
from claq_exp.payload.codebooks import CodebookLayout, LevelColumns
from claq_exp.payload.stored import StoredTensor


@dataclass(frozen=True, kw_only=True)
class ColumnCodebooksLayout(CodebookLayout):
    """The layout of a codebook for each column."""

    kind: ClassVar[str] = "column_codebooks"

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return what all codebooks have, and 2**width levels for each column of a width."""
        books = {
            f"codebooks_{width}": StoredTensor("F16", (columns, 2**width), "codebooks")
            for width, columns in self.widths().items()
        }
        return super().stored_tensors() | books


@dataclass(frozen=True)
class ColumnCodebooks(LevelColumns):
    """A matrix with a codebook for each column.

    values: [in, 2**widest] float16; entries past a column's 2**bits are zero and unused.
    row_scales: [out] float16 that multiply what the codebooks give, or None.
    """

    kind: ClassVar[str] = ColumnCodebooksLayout.kind
    layout_class: ClassVar[type[Layout]] = ColumnCodebooksLayout

    values: Tensor
    row_scales: Tensor | None = None

    def layout(self) -> ColumnCodebooksLayout:
        """Describe how this matrix is stored."""
        scaled = self.row_scales is not None
        return ColumnCodebooksLayout.of(
            self.shape[0], self.column_bits, self.reserved.counts, row_scaled=scaled
        )

    def levels(self) -> Tensor:
        """Return the levels of every column: [in, 2**widest] float."""
        return wide(self.values)

    def clamped(self) -> int:
        """Return how many weights are cut: none, if float16 holds what they are looked up in."""
        return 0 if self.row_scales is None else super().clamped()

    def trainable(self) -> dict[str, Tensor]:
        """Return `codebooks`, and what the bases have."""
        return {"codebooks": self.values} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        same = super().with_values(values)
        return replace(same, values=values.get("codebooks", self.values))

    def rebuilt(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers, rounded; unused levels stay zero."""
        same = super().rebuilt(values)
        used = torch.arange(self.values.shape[1], device=self.values.device)
        widths = self.column_bits[:, None].int()
        return replace(same, values=same.values * (used < 2**widths))

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        books = {
            f"codebooks_{width}": self.values[columns, : 2**width].contiguous()
            for width, columns in columns_of.items()
        }
        return books | super()._pack_own(columns_of)

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        widths = layout.widths()
        values = torch.zeros(layout.columns, 2 ** max(widths), dtype=torch.float16)
        for width in widths:
            values[column_bits == width, : 2**width] = tensors[f"codebooks_{width}"]
        return {"values": values, "row_scales": tensors.get("row_scales")}
