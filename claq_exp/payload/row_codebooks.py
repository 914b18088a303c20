"""The form `row_codebooks`: a codebook for each output row (SqueezeLLM, arXiv 2306.07629)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.payload.base import Layout, wide
from claq_exp.payload.columns import (
    ColumnLayout,
    ColumnPayload,
    Lookups,
    bands,
    coded_tensors,
)
from claq_exp.payload.stored import StoredTensor


@dataclass(frozen=True, kw_only=True)
class RowCodebooksLayout(ColumnLayout):
    """The layout of a codebook for each row."""

    kind: ClassVar[str] = "row_codebooks"

    def __post_init__(self) -> None:
        """Raise CheckpointError for numbers that do not fit each other."""
        super().__post_init__()
        if len(self.columns_per_width) != 1:
            raise CheckpointError("row codebooks have one code width")

    @property
    def bits(self) -> int:
        """The one width of codes."""
        return min(self.columns_per_width)

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return codes and reserved entries, and 2**width levels for each row."""
        books = StoredTensor("F16", (self.rows, 2**self.bits), "codebooks")
        return coded_tensors(self) | {f"codebooks_{self.bits}": books}

    def describe(self) -> str:
        """Return what codes stand for in a few words."""
        return "row codebooks"


@dataclass(frozen=True)
class RowCodebooks(ColumnPayload):
    """A matrix with a codebook for each row; all columns have one width.

    values: [out, 2**width] float16.
    """

    kind: ClassVar[str] = RowCodebooksLayout.kind
    layout_class: ClassVar[type[Layout]] = RowCodebooksLayout

    values: Tensor

    def layout(self) -> RowCodebooksLayout:
        """Describe how this matrix is stored."""
        return RowCodebooksLayout.of(self.shape[0], self.column_bits, self.reserved.counts)

    def clamped(self) -> int:
        """Return how many weights are cut: none, float16 holds what they are looked up in."""
        return 0

    def trainable(self) -> dict[str, Tensor]:
        """Return `codebooks`, and what the base has."""
        return {"codebooks": self.values} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        return replace(super().with_values(values), values=values.get("codebooks", self.values))

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        values = wide(self.values)
        for columns in bands(self.shape[1]):
            yield columns, values.gather(1, self.codes[:, columns].long())

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        (width,) = columns_of
        return {f"codebooks_{width}": self.values.contiguous()}

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        return {"values": tensors[f"codebooks_{layout.bits}"]}

    def _lookups(self, device: torch.device) -> Lookups:
        levels = self.values.float()
        return Lookups(float(levels.abs().max()), row_levels=levels)
