"""What is decided of a matrix before its columns are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from claq_exp.quantize.codebook import Codebook


COLUMN, MATRIX = "column", "matrix"
STEPS = (COLUMN, MATRIX)


@dataclass(frozen=True)
class Thresholding:
    """How a solver moves reserved entries over a matrix while it solves.

    whole_columns: whole columns are reserved; else single entries.
    step: "column", an entry counts by what reserving it alone takes off the loss; or "matrix", by
        its size after one step of the gradient that is the same for the whole matrix.
    """

    whole_columns: bool
    step: str


@dataclass(frozen=True)
class ColumnPlan:
    """Widths and reservations of a matrix.

    column_bits: [in] uint8, code width of each column.
    reserved_counts: [in] int64, entries of each column that stay in float16.
    select: which entries those are: "magnitude", the largest, or "tails", from both ends of the
        column in equal number.
    thresholding: the solver moves them: `reserved_counts` are those of its start, and in the end
        there are as many in all.  None: they stay in their columns.
    """

    column_bits: Tensor
    reserved_counts: Tensor
    select: str = "magnitude"
    thresholding: Thresholding | None = None

    @property
    def most_reserved(self) -> int:
        """The most entries that a column may have whose number takes no more bits than planned."""
        most = int(self.reserved_counts.max())
        return most if self.thresholding is None else 2 ** most.bit_length() - 1


@dataclass(frozen=True)
class MatrixPlan:
    """What is decided of a matrix: its codebook, its columns, and what its rows weigh.

    row_weights: [out] float32, importance of an error in each row for the codebooks; None for all
        alike.
    """

    codebook: Codebook
    columns: ColumnPlan
    row_weights: Tensor | None = None
