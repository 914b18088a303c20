"""The same share of every column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.quantize.reservation.ratio import Ratio
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Fixed(Ratio):
    """Keep `ratio` of the entries, the same number in each column up to rounding."""

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64."""
        rows, columns = statistics.shape
        return self.counts(torch.ones(columns, dtype=torch.float64), rows)
