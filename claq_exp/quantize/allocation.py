"""What is decided of a matrix before its columns are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from claq_exp.quantize.codebook import Codebook


@dataclass(frozen=True)
class ColumnPlan:
    """Widths and reservations of a matrix.

    column_bits: [in] uint8, code width of each column.
    reserved_counts: [in] int64, entries of each column that stay in float16.
    select: which entries those are: "magnitude", the largest, or "tails", from both ends of the
        column in equal number.
    """

    column_bits: Tensor
    reserved_counts: Tensor
    select: str = "magnitude"


@dataclass(frozen=True)
class MatrixPlan:
    """What is decided of a matrix: its codebook, its columns, and what its rows weigh.

    row_weights: [out] float32, importance of an error in each row for the codebooks; None for all
        alike.
    """

    codebook: Codebook
    columns: ColumnPlan
    row_weights: Tensor | None = None
