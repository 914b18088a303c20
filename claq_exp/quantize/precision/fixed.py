"""The same width for every column."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.payload.stored import MAX_BITS
from claq_exp.quantize.precision.base import Precision, Range
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Fixed(Precision):
    """Give every column `bits` bits."""

    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ConfigError(
                f"precision.bits is {self.bits}; give a whole number from 1 to {MAX_BITS}"
            )

    def ranges(self) -> list[Range]:
        """Return each whole number of bits, see Precision."""

        def at(bits: float) -> Fixed:
            return replace(self, bits=int(bits))

        return [(bits, bits, at) for bits in range(1, MAX_BITS + 1)]

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the width of each column: [in] uint8."""
        return torch.full((statistics.shape[1],), self.bits, dtype=torch.uint8)
