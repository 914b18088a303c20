"""What stored forms share whose codes choose a level of their column, with a scale for each row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.payload.base import wide
from claq_exp.payload.columns import (
    ColumnLayout,
    ColumnPayload,
    Lookups,
    bands,
    coded_tensors,
    looked_up,
)
from claq_exp.payload.stored import StoredTensor


@dataclass(frozen=True, kw_only=True)
class CodebookLayout(ColumnLayout):
    """The layout of codebooks.  row_scaled: every row has a scale."""

    row_scaled: bool = False

    def __post_init__(self) -> None:
        """Raise CheckpointError for a flag that is none."""
        super().__post_init__()
        if type(self.row_scaled) is not bool:
            raise CheckpointError(f"row_scaled must be true or false, not {self.row_scaled}")

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return codes, widths, reserved entries and row scales."""
        tensors = coded_tensors(self)
        if self.row_scaled:
            tensors["row_scales"] = StoredTensor("F16", (self.rows,), "scales")
        return tensors

    def describe(self) -> str:
        """Return what codes stand for in a few words."""
        return self.kind.replace("_", " ") + (", row scales" if self.row_scaled else "")


class LevelColumns(ColumnPayload):
    """The base of these forms: w = level of its column, times the scale of its row.

    row_scales: [out] float16 that multiply what the levels give, or None.
    """

    row_scales: Tensor | None

    @abstractmethod
    def levels(self) -> Tensor:
        """Return the levels of every column: [in, 2**widest] float, unused ones 0."""

    def trainable(self) -> dict[str, Tensor]:
        """Return row scales, and what the base has."""
        scales = {} if self.row_scales is None else {"row_scales": self.row_scales}
        return scales | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        same: Any = super().with_values(values)
        changed: Self = replace(same, row_scales=values.get("row_scales", self.row_scales))
        return changed

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        levels = self.levels()
        for columns in bands(self.shape[1]):
            part = looked_up(levels, self.codes, columns)
            if self.row_scales is not None:
                part = part * wide(self.row_scales)[:, None]
            yield columns, part

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {} if self.row_scales is None else {"row_scales": self.row_scales}

    def _lookups(self, device: torch.device) -> Lookups:
        levels = self.levels()
        widest, scales = float(levels.abs().max()), None
        if self.row_scales is not None:
            scales = self.row_scales.float()
            widest *= float(scales.abs().max())
        return Lookups(widest, levels, row_scales=scales)
