"""CLAQ's adaptive precision: the columns with most outliers get the higher of two widths."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.layout import MAX_BITS
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class OutlierOrder:
    """Give the higher of two widths to as many columns with most outliers as the target allows.

    target_bits: mean code bits per weight; the plan never exceeds it.
    threshold: an outlier reaches this multiple of the matrix mean of |W| (CLAQ: 13).
    low_bits, high_bits: both or neither; without them the reference code's pairs, 2/4 below 3 bits
        and 3/4 from 3 to 4.

    Source: CLAQ (arXiv 2405.17233), adaptive precision.
    """

    target_bits: float = 3.5
    threshold: float = 13.0
    low_bits: int | None = None
    high_bits: int | None = None

    def __post_init__(self) -> None:
        if (self.low_bits is None) != (self.high_bits is None):
            raise ConfigError(
                "precision.low_bits and precision.high_bits belong together; set both or neither"
            )
        if not self.threshold > 0:
            raise ConfigError(
                f"precision.threshold is {self.threshold}; give a positive number (the paper "
                "uses 13)"
            )
        low, high = self.pair()
        if not 1 <= low < high <= MAX_BITS:
            raise ConfigError(
                f"precision.low_bits={low} and high_bits={high}; need 1 <= low < high <= {MAX_BITS}"
            )
        if not low <= self.target_bits <= high:
            raise ConfigError(
                f"precision.target_bits={self.target_bits} cannot be reached with {low}- and "
                f"{high}-bit columns; give a number from {low} to {high}, or set "
                "precision.low_bits and precision.high_bits"
            )

    def pair(self) -> tuple[int, int]:
        """Return (low, high) widths."""
        if self.low_bits is not None and self.high_bits is not None:
            return self.low_bits, self.high_bits
        if not 2 <= self.target_bits <= 4:
            raise ConfigError(
                f"precision.target_bits={self.target_bits} is outside 2 to 4, the reach of the "
                "paper's column pairs (2/4, 3/4); set precision.low_bits and precision.high_bits"
            )
        return (2, 4) if self.target_bits < 3 else (3, 4)

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the width of each column: [in] uint8."""
        low, high = self.pair()
        columns = statistics.shape[1]
        share = (self.target_bits - low) / (high - low)
        chosen = math.floor(columns * share + 1e-9)  # 2.1 is not exact in binary
        bits = torch.full((columns,), low, dtype=torch.uint8)
        bits[statistics.outlier_order(self.threshold)[:chosen]] = high
        return bits
