"""Adaptive precision by size: the columns with the largest weights get the higher width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from claq_exp.quantize.precision.two_widths import TwoWidths
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Magnitude(TwoWidths):
    """Give the higher width to the columns of largest mean |W|."""

    def order(self, statistics: ColumnStatistics) -> Tensor:
        """Return the columns from largest to smallest mean |W|: [in] int64."""
        return statistics.magnitude_order()
