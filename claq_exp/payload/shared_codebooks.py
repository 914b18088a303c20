"""The form `shared_codebooks`: one codebook per width, moved and stretched for each column."""

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
class SharedCodebooksLayout(CodebookLayout):
    """The layout of shared codebooks."""

    kind: ClassVar[str] = "shared_codebooks"

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return what all codebooks have, a codebook per width, and two scales per column."""
        books = {
            f"codebooks_{width}": StoredTensor("F16", (2**width,), "codebooks")
            for width in self.widths()
        }
        scales = {"column_scales": StoredTensor("F16", (self.columns, 2), "scales")}
        return super().stored_tensors() | books | scales


@dataclass(frozen=True)
class SharedCodebooks(LevelColumns):
    """A matrix with one codebook per width: w = (scale * level + shift) * scale of the row.

    books: width -> [2**width] float16, ascending.  column_scales: [in, 2] float16, scale and shift.
    row_scales: [out] float16, or None.
    """

    kind: ClassVar[str] = SharedCodebooksLayout.kind
    layout_class: ClassVar[type[Layout]] = SharedCodebooksLayout

    books: dict[int, Tensor]
    column_scales: Tensor
    row_scales: Tensor | None = None

    def layout(self) -> SharedCodebooksLayout:
        """Describe how this matrix is stored."""
        scaled = self.row_scales is not None
        return SharedCodebooksLayout.of(
            self.shape[0], self.column_bits, self.reserved.counts, row_scaled=scaled
        )

    def levels(self) -> Tensor:
        """Return the levels of every column: [in, 2**widest] float."""
        scales = wide(self.column_scales)
        books = {width: wide(book) for width, book in self.books.items()}
        dtypes = {scales.dtype, *(book.dtype for book in books.values())}
        levels = torch.zeros(
            *(len(self.column_bits), 2 ** max(books)),
            dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
            device=scales.device,
        )
        for width, book in books.items():
            columns = self.column_bits == width
            scale, shift = scales[columns].split(1, dim=1)
            levels[columns, : 2**width] = (scale * book + shift).to(levels.dtype)
        return levels

    def trainable(self) -> dict[str, Tensor]:
        """Return `codebooks_WIDTH`, `column_scales`, and what the bases have."""
        books = {f"codebooks_{width}": book for width, book in self.books.items()}
        return books | {"column_scales": self.column_scales} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        same = super().with_values(values)
        books = {w: values.get(f"codebooks_{w}", book) for w, book in self.books.items()}
        scales = values.get("column_scales", self.column_scales)
        return replace(same, books=books, column_scales=scales)

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        books = {f"codebooks_{width}": self.books[width] for width in columns_of}
        scales = {"column_scales": self.column_scales}
        return books | scales | super()._pack_own(columns_of)

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        return {
            "books": {width: tensors[f"codebooks_{width}"] for width in layout.widths()},
            "column_scales": tensors["column_scales"],
            "row_scales": tensors.get("row_scales"),
        }
