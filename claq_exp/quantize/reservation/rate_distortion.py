"""Reservation that competes with code widths for the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.reservation.base import Reservation
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class JointReservation(Reservation):
    """Leave the choice to `precision=rate_distortion`, column by column.

    small, large: the shares of a column's entries that it may keep, beside none.
    """

    small: float = 0.0025
    large: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.small < self.large <= 1:
            raise ConfigError(
                f"reservation.small={self.small} and large={self.large}; need 0 < small < large "
                "<= 1"
            )

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return zero for each column, for nothing is decided matrix by matrix: [in] int64."""
        return torch.zeros(statistics.shape[1], dtype=torch.int64)
