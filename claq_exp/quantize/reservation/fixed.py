"""The same share of every column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.quantize.reservation.shares import check_ratio, counts_from_shares
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Fixed:
    """Keep `ratio` of the entries, the same number in each column up to rounding.

    ratio: share of all entries of the matrix, both tails together; realised to the entry.
    """

    ratio: float = 0.005

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64."""
        rows, columns = statistics.shape
        return counts_from_shares(
            torch.ones(columns, dtype=torch.float64), round(self.ratio * rows * columns), rows
        )
