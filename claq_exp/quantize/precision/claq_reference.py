"""Adaptive precision exactly as CLAQ's reference code does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.precision.base import Precision
from claq_exp.quantize.precision.two_widths import paper_pair
from claq_exp.quantize.statistics import VISITING, ColumnStatistics

THRESHOLD = 13.0  # written into the reference code, for AP and for OR


@dataclass(frozen=True)
class ClaqReference(Precision):
    """Give 4 bits to the `round(columns * share)` columns with most outliers, ties by visiting.

    An outlier reaches 13 times the matrix mean of |W|.  Unlike outlier_order, the count is rounded
    to even, so that a matrix may exceed the target by half a column.

    target_bits: from 2 to 4; below 3 the share of 4-bit columns beside 2-bit ones is
        (target - 2) / 2, from 3 beside 3-bit ones target - 3.

    Source: reference code of CLAQ (arXiv 2405.17233), option `--outlierorder`, with a stable sort.
    """

    target_bits: float = 2.05

    def __post_init__(self) -> None:
        if not 2 <= self.target_bits <= 4:
            raise ConfigError(
                f"precision.target_bits={self.target_bits} is outside 2 to 4, the reach of the "
                "reference code; use precision=outlier_order with widths of your own"
            )

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the width of each column: [in] uint8."""
        low, high = paper_pair(self.target_bits)
        columns = statistics.shape[1]
        chosen = round(columns * ((self.target_bits - low) / (high - low)))
        bits = torch.full((columns,), low, dtype=torch.uint8)
        bits[statistics.outlier_order(THRESHOLD, VISITING)[:chosen]] = high
        return bits
