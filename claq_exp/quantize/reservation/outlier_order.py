"""CLAQ's outlier reservation: columns with more outliers keep a larger share of their entries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.reservation.shares import check_ratio, counts_from_shares
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class OutlierOrder:
    """Keep `ratio` of the entries, `boost` times the share in columns with most outliers.

    ratio: share of all entries of the matrix, both tails together; realised to the entry.
    top_columns: share of the columns that count as sensitive (CLAQ: 0.1).
    boost: their share over that of the others (CLAQ: 1.4 % over 0.4 % a side, i.e. 3.5).
    threshold: an outlier reaches this multiple of the matrix mean of |W| (CLAQ: 13).

    Source: CLAQ (arXiv 2405.17233), outlier reservation.  Ratio 0.01 is the design of the reference
    code (0.8 % of an ordinary and 2.8 % of a sensitive column), 0.005 the 0.07 bit that it charges.
    """

    ratio: float = 0.005
    top_columns: float = 0.1
    boost: float = 3.5
    threshold: float = 13.0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if not 0 <= self.top_columns <= 1:
            raise ConfigError(
                f"reservation.top_columns is {self.top_columns}; give a share of columns from 0 "
                "to 1"
            )
        if not (self.boost >= 1 and self.threshold > 0):
            raise ConfigError(
                "reservation.boost must be at least 1 and reservation.threshold positive"
            )

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64."""
        rows, columns = statistics.shape
        order = statistics.outlier_order(self.threshold)
        shares = torch.ones(columns, dtype=torch.float64)
        shares[: math.floor(self.top_columns * columns + 0.5)] = self.boost
        counts = torch.empty(columns, dtype=torch.int64)
        counts[order] = counts_from_shares(shares, round(self.ratio * rows * columns), rows)
        return counts
