"""Outlier reservation exactly as CLAQ's reference code does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.reservation.base import Reservation
from claq_exp.quantize.reservation.shares import TAILS
from claq_exp.quantize.statistics import VISITING, ColumnStatistics

THRESHOLD = 13.0  # these four are written into the reference code
TOP_COLUMNS = 0.1
TOP_RATE = 0.014  # of either tail
RATE = 0.004


@dataclass(frozen=True)
class ClaqReference(Reservation):
    """Keep 1.4 % a side of the tenth of the columns with most outliers, 0.4 % a side of the others.

    What is kept is round(m r) + 1 entries from the top and m - round(m (1 - r)) from the bottom of
    m; equal values at the border are cut there and not all kept.  Ties of columns are left in
    visiting order.

    block: the rate of the column at position j of the visiting order is that of position j mod
        `block`, the reference code's index error; 0 takes each column's own rate.  The share that
        is kept in the end depends on the weights, from 0.8 to 2.8 %; a plan made before any weight
        is read sees ties alone and gives the upper end.

    Source: reference code of CLAQ (arXiv 2405.17233), option `--outlier_col_dynamic`.
    """

    select: ClassVar[str] = TAILS

    block: int = 128

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ConfigError(
                f"reservation.block is {self.block}; give the columns of a block, or 0"
            )

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64."""
        rows, columns = statistics.shape
        counts = torch.full((columns,), _kept(rows, RATE), dtype=torch.int64)
        top = statistics.outlier_order(THRESHOLD, VISITING)[: round(TOP_COLUMNS * columns)]
        counts[top] = _kept(rows, TOP_RATE)
        if self.block:
            taken_from = statistics.order[torch.arange(columns) % self.block]
            counts[statistics.order] = counts[taken_from]
        return counts


def _kept(rows: int, rate: float) -> int:
    return min(round(rows * rate) + 1 + rows - round(rows * (1 - rate)), rows)
