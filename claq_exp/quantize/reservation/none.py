"""No reservation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.quantize.reservation.base import Reservation
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class NoReservation(Reservation):
    """Quantize every entry."""

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return zero for each column: [in] int64."""
        return torch.zeros(statistics.shape[1], dtype=torch.int64)
