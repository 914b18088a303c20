"""What all rules share that keep a given share of a matrix's entries."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, one_of
from claq_exp.quantize.reservation.base import Reservation
from claq_exp.quantize.reservation.shares import MAGNITUDE, SELECTIONS, counts_from_shares
from claq_exp.quantize.statistics import ColumnStatistics

BOTH_TAILS, EACH_TAIL = "both_tails", "each_tail"
RATIO_OF = (BOTH_TAILS, EACH_TAIL)


@dataclass(frozen=True)
class Ratio(Reservation):
    """Keep `ratio` of the entries.

    ratio: share of all entries of the matrix; realised to the entry.
    ratio_of: both_tails (ratio is the whole share) or each_tail (ratio is the share of either tail,
        as in the reference code, so that twice as many entries stay).
    select: which entries of a column stay: magnitude (the largest |w|) or tails (the larger half of
        them from the top, the other half from the bottom).
    """

    ratio: float = 0.005
    ratio_of: str = BOTH_TAILS
    select: str = MAGNITUDE

    def __post_init__(self) -> None:
        if self.ratio_of not in RATIO_OF:
            raise ConfigError(one_of("reservation.ratio_of", self.ratio_of, RATIO_OF))
        if self.select not in SELECTIONS:
            raise ConfigError(one_of("reservation.select", self.select, SELECTIONS))
        limit = 1 / self._tails()
        if not 0 <= self.ratio <= limit:
            raise ConfigError(
                f"reservation.ratio is {self.ratio}; give the share of entries to keep, from 0 to "
                f"{limit:g} (e.g. 0.01)"
            )

    def counts(self, shares: Tensor, rows: int) -> Tensor:
        """Split the entries over columns in proportion to shares [in] float64: [in] int64."""
        total = round(self._tails() * self.ratio * rows * len(shares))
        return counts_from_shares(shares, total, rows)

    def _tails(self) -> int:
        return 2 if self.ratio_of == EACH_TAIL else 1


@dataclass(frozen=True)
class TopColumns(Ratio, ABC):
    """Keep `ratio` of the entries, `boost` times the share in the first columns of an order.

    top_columns: share of the columns that count as sensitive (CLAQ: 0.1).
    boost: their share over that of the others (CLAQ: 1.4 % over 0.4 % a side, i.e. 3.5).

    Source: CLAQ (arXiv 2405.17233), outlier reservation.  Ratio 0.01 is the design of the reference
    code (0.8 % of an ordinary and 2.8 % of a sensitive column), 0.005 the 0.07 bit that it charges.
    """

    top_columns: float = 0.1
    boost: float = 3.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.top_columns <= 1:
            raise ConfigError(
                f"reservation.top_columns is {self.top_columns}; give a share of columns from 0 "
                "to 1"
            )
        if not self.boost >= 1:
            raise ConfigError(f"reservation.boost is {self.boost}; give at least 1")

    @abstractmethod
    def order(self, statistics: ColumnStatistics) -> Tensor:
        """Return the columns, the most sensitive first: [in] int64."""

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64."""
        rows, columns = statistics.shape
        shares = torch.ones(columns, dtype=torch.float64)
        shares[: math.floor(self.top_columns * columns + 0.5)] = self.boost
        counts = torch.empty(columns, dtype=torch.int64)
        counts[self.order(statistics)] = self.counts(shares, rows)
        return counts
