"""Reservation that competes with code widths for the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.quantize.reservation.shares import check_ratio
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class JointReservation:
    """Leave the choice to `precision=rate_distortion`, column by column.

    small, large: the shares of a column's entries that it may keep, beside none.
    """

    small: float = 0.005
    large: float = 0.015

    def __post_init__(self) -> None:
        check_ratio(self.small)
        check_ratio(self.large)

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return zero for each column, for nothing is decided matrix by matrix: [in] int64."""
        return torch.zeros(statistics.shape[1], dtype=torch.int64)
