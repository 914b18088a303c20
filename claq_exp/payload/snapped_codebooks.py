"""The form `snapped_codebooks`: a codebook for each column, of levels that stand in one set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.number_formats.level_sets import check_level_set, level_set
from claq_exp.payload.base import Layout, wide
from claq_exp.payload.codebooks import CodebookLayout, LevelColumns
from claq_exp.payload.packing import pack, unpack
from claq_exp.payload.stored import StoredTensor


@dataclass(frozen=True, kw_only=True)
class SnappedCodebooksLayout(CodebookLayout):
    """The layout of these codebooks.

    level_set, level_bits: the name of the set, and the bits of an index into it.
    """

    kind: ClassVar[str] = "snapped_codebooks"

    level_set: str
    level_bits: int

    def __post_init__(self) -> None:
        """Raise CheckpointError for a set that there is not."""
        super().__post_init__()
        if type(self.level_set) is not str or type(self.level_bits) is not int:
            raise CheckpointError(f"level_set {self.level_set} of {self.level_bits} bits is none")
        try:
            check_level_set(self.level_set, self.level_bits)
        except ConfigError as error:
            raise CheckpointError(f"level_set of a layout: {error}") from error

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return what all codebooks have, 2**width indices and a scale for each column."""
        books = {
            f"codebooks_{width}": StoredTensor.of_integers(
                (columns,), 2**width, self.level_bits, "codebooks"
            )
            for width, columns in self.widths().items()
        }
        scales = {"column_scales": StoredTensor("F16", (self.columns,), "scales")}
        return super().stored_tensors() | books | scales


@dataclass(frozen=True)
class SnappedCodebooks(LevelColumns):
    """A matrix with a codebook for each column: w = scale of the column * level * scale of the row.

    indices: [in, 2**widest] uint8 into the set; those past a column's 2**bits are 0 and unused.
    column_scales: [in] float16.  level_set, level_bits: as of the layout.
    row_scales: [out] float16, or None.
    """

    kind: ClassVar[str] = SnappedCodebooksLayout.kind
    layout_class: ClassVar[type[Layout]] = SnappedCodebooksLayout

    indices: Tensor
    column_scales: Tensor
    level_set: str
    level_bits: int
    row_scales: Tensor | None = None

    def layout(self) -> SnappedCodebooksLayout:
        """Describe how this matrix is stored."""
        return SnappedCodebooksLayout.of(
            self.shape[0],
            self.column_bits,
            self.reserved.counts,
            row_scaled=self.row_scales is not None,
            level_set=self.level_set,
            level_bits=self.level_bits,
        )

    def levels(self) -> Tensor:
        """Return the levels of every column: [in, 2**widest] float."""
        scales = wide(self.column_scales)
        known = level_set(self.level_set, self.level_bits).to(scales)
        used = torch.arange(self.indices.shape[1], device=scales.device)
        widths = self.column_bits[:, None].int().to(scales.device)
        return scales[:, None] * known[self.indices.long()] * (used < 2**widths)

    def trainable(self) -> dict[str, Tensor]:
        """Return `column_scales`, and what the bases have."""
        return {"column_scales": self.column_scales} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        same = super().with_values(values)
        return replace(same, column_scales=values.get("column_scales", self.column_scales))

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        books = {
            f"codebooks_{width}": pack(self.indices[columns, : 2**width], self.level_bits)
            for width, columns in columns_of.items()
        }
        return books | {"column_scales": self.column_scales} | super()._pack_own(columns_of)

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        indices = torch.zeros(layout.columns, 2 ** max(layout.widths()), dtype=torch.uint8)
        known = len(level_set(layout.level_set, layout.level_bits))
        for width in layout.widths():
            own = unpack(tensors[f"codebooks_{width}"], layout.level_bits, 2**width)
            if int(own.max()) >= known:
                raise CheckpointError(
                    f"codebooks_{width} has the level {int(own.max())} of a set of {known}"
                )
            indices[column_bits == width, : 2**width] = own.to(torch.uint8)
        return {
            "indices": indices,
            "column_scales": tensors["column_scales"],
            "level_set": layout.level_set,
            "level_bits": layout.level_bits,
            "row_scales": tensors.get("row_scales"),
        }
