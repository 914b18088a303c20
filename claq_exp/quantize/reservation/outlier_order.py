"""CLAQ's outlier reservation: columns with more outliers keep a larger share of their entries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from claq_exp.errors import ConfigError, one_of
from claq_exp.quantize.reservation.ratio import TopColumns
from claq_exp.quantize.statistics import SALIENCY, TIES, ColumnStatistics


@dataclass(frozen=True)
class OutlierOrder(TopColumns):
    """Keep a larger share in the columns with most outliers.

    threshold: an outlier reaches this multiple of the matrix mean of |W| (CLAQ: 13).
    ties: which of two columns with equally many comes first: saliency (the larger OBS saliency) or
        visiting (the one that is visited first, as the reference code's sort leaves it).

    Source: CLAQ (arXiv 2405.17233), outlier reservation by Outlier Order.
    """

    threshold: float = 13.0
    ties: str = SALIENCY

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold > 0:
            raise ConfigError(
                f"reservation.threshold is {self.threshold}; give a positive number (the paper "
                "uses 13)"
            )
        if self.ties not in TIES:
            raise ConfigError(one_of("reservation.ties", self.ties, TIES))

    def order(self, statistics: ColumnStatistics) -> Tensor:
        """Return the columns from most to least outliers: [in] int64."""
        return statistics.outlier_order(self.threshold, self.ties)
