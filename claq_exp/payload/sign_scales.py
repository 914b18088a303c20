"""The form `sign_scales`: a sign per weight, a scale per row and per column.

w = sign * row scale * column scale, 1 + 16 / rows + 16 / columns bits a weight (OneBit, arXiv
2402.11295, eq. 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from claq_exp.payload.base import Layout, wide
from claq_exp.payload.codebooks import LevelColumns
from claq_exp.payload.columns import Reserved, coded_tensors
from claq_exp.payload.stored import StoredTensor


@dataclass(frozen=True, kw_only=True)
class SignScalesLayout(Layout):
    """The layout of signs and scales; nothing is reserved."""

    kind: ClassVar[str] = "sign_scales"

    rows: int
    columns: int

    def widths(self) -> dict[int, int]:
        """Return the one width of codes -> columns."""
        return {1: self.columns}

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return signs as codes, and the two scales."""
        return coded_tensors(self) | {
            "column_scales": StoredTensor("F16", (self.columns,), "scales"),
            "row_scales": StoredTensor("F16", (self.rows,), "scales"),
        }

    def describe(self) -> str:
        """Return what codes stand for in a few words."""
        return "signs, row and column scales"


@dataclass(frozen=True)
class SignScales(LevelColumns):
    """A matrix of signs and scales: code 0 is minus, code 1 is plus.

    column_scales: [in] float16.  row_scales: [out] float16.
    """

    kind: ClassVar[str] = SignScalesLayout.kind
    layout_class: ClassVar[type[Layout]] = SignScalesLayout

    column_scales: Tensor
    row_scales: Tensor

    @staticmethod
    def of(codes: Tensor, column_scales: Tensor, row_scales: Tensor) -> SignScales:
        """Return the matrix of these codes: [out, in] uint8."""
        columns = codes.shape[1]
        widths = torch.ones(columns, dtype=torch.uint8)
        return SignScales(codes, widths, Reserved.none(columns), column_scales, row_scales)

    def layout(self) -> SignScalesLayout:
        """Describe how this matrix is stored."""
        rows, columns = self.shape
        return SignScalesLayout(rows=rows, columns=columns)

    def levels(self) -> Tensor:
        """Return the two levels of every column: [in, 2] float."""
        scales = wide(self.column_scales)
        return torch.stack([-scales, scales], dim=1)

    def trainable(self) -> dict[str, Tensor]:
        """Return `column_scales` and `row_scales`."""
        return {"column_scales": self.column_scales} | super().trainable()

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        same = super().with_values(values)
        return replace(same, column_scales=values.get("column_scales", self.column_scales))

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {"column_scales": self.column_scales} | super()._pack_own(columns_of)

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        return {name: tensors[name] for name in ("column_scales", "row_scales")}
