"""What a rule for reserved counts is."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from claq_exp.quantize.allocation import Thresholding
from claq_exp.quantize.reservation.shares import MAGNITUDE
from claq_exp.quantize.statistics import ColumnStatistics


class Reservation(Protocol):
    """A rule for reserved counts; its plan depends on its arguments and fields alone."""

    @property
    def select(self) -> str:
        """Which entries of a column stay: magnitude (the largest) or tails (from both ends)."""
        return MAGNITUDE

    @property
    def thresholding(self) -> Thresholding | None:
        """How the solver moves reserved entries, where it does: few solvers can."""
        return None

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64, at most `out` each."""

    def plan_key(self, name: str) -> Hashable:
        """Return what of a layer's name decides the counts."""
        return None


@dataclass(frozen=True)
class Planned(Reservation):
    """Keep the entries that a rule plans at first, whatever solvers it is for."""

    rule: Reservation

    @property
    def select(self) -> str:
        """Return the rule's, see Reservation."""
        return self.rule.select

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the rule's counts, see Reservation."""
        return self.rule.plan(statistics)

    def plan_key(self, name: str) -> Hashable:
        """Return the rule's, see Reservation."""
        return self.rule.plan_key(name)
