"""What all rules share that give the first columns of an order the higher of two widths."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.payload.stored import MAX_BITS
from claq_exp.quantize.precision.base import Precision, Range
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class TwoWidths(Precision, ABC):
    """Give the higher of two widths to as many columns as the target allows.

    target_bits: mean code bits per weight; the plan never exceeds it.
    low_bits, high_bits: both or neither; without them the reference code's pairs, 2/4 below 3 bits
        and 3/4 from 3 to 4.

    Source: CLAQ (arXiv 2405.17233), adaptive precision.
    """

    target_bits: float = 3.5
    low_bits: int | None = None
    high_bits: int | None = None

    def __post_init__(self) -> None:
        if (self.low_bits is None) != (self.high_bits is None):
            raise ConfigError(
                "precision.low_bits and precision.high_bits belong together; set both or neither"
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

    @abstractmethod
    def order(self, statistics: ColumnStatistics) -> Tensor:
        """Return the columns, those that need the higher width most first: [in] int64."""

    def pair(self) -> tuple[int, int]:
        """Return (low, high) widths."""
        if self.low_bits is not None and self.high_bits is not None:
            return self.low_bits, self.high_bits
        return paper_pair(self.target_bits)

    def ranges(self) -> list[Range]:
        """Return (lowest, highest, rule at so many bits) where one pair of widths serves all."""

        def at(bits: float) -> TwoWidths:
            return replace(self, target_bits=bits)

        if self.low_bits is not None and self.high_bits is not None:
            return [(self.low_bits, self.high_bits, at)]
        return [(2, math.nextafter(3, 2), at), (3, 4, at)]

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the width of each column: [in] uint8."""
        low, high = self.pair()
        columns = statistics.shape[1]
        share = (self.target_bits - low) / (high - low)
        chosen = math.floor(columns * share + 1e-9)  # 2.1 is not exact in binary
        bits = torch.full((columns,), low, dtype=torch.uint8)
        bits[self.order(statistics)[:chosen]] = high
        return bits


def paper_pair(target_bits: float) -> tuple[int, int]:
    """Return the (low, high) widths of CLAQ for a target from 2 to 4.  Raises ConfigError."""
    if not 2 <= target_bits <= 4:
        raise ConfigError(
            f"precision.target_bits={target_bits} is outside 2 to 4, the reach of the "
            "paper's column pairs (2/4, 3/4); set precision.low_bits and precision.high_bits"
        )
    return (2, 4) if target_bits < 3 else (3, 4)
