"""The control of adaptive precision: any columns get the higher width."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.precision.two_widths import TwoWidths
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Random(TwoWidths):
    """Give the higher width to columns drawn at random.

    seed: with the layer's name and shape it fixes the draw; reservation=random of the same seed
        draws the same columns.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ConfigError(f"precision.seed is {self.seed}; give a whole number from 0")

    def order(self, statistics: ColumnStatistics) -> Tensor:
        """Return the columns in random order: [in] int64."""
        return statistics.random_order(self.seed)
