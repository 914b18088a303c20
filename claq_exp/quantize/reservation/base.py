"""What a rule for reserved counts is."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from torch import Tensor

from claq_exp.quantize.reservation.shares import MAGNITUDE
from claq_exp.quantize.statistics import ColumnStatistics


class Reservation(Protocol):
    """A rule for reserved counts; its plan depends on its arguments and fields alone."""

    @property
    def select(self) -> str:
        """Which entries of a column stay: magnitude (the largest) or tails (from both ends)."""
        return MAGNITUDE

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64, at most `out` each."""

    def plan_key(self, name: str) -> Hashable:
        """Return what of a layer's name decides the counts."""
        return None
