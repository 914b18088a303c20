"""What a rule for code widths is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Protocol

from torch import Tensor

from claq_exp.quantize.statistics import ColumnStatistics

Range = tuple[float, float, Callable[[float], "Precision"]]


class Precision(Protocol):
    """A rule for code widths; its plan depends on its arguments and fields alone."""

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the code width of each column: [in] uint8, each from 1 to 8."""

    def plan_key(self, name: str) -> Hashable:
        """Return what of a layer's name decides how many columns get which width."""
        return None

    def check_names(self, names: Collection[str]) -> None:
        """Raise ConfigError where a rule that names layers names one that a model has not."""
        return

    def ranges(self) -> Sequence[Range]:
        """Return (lowest, highest, rule at so many bits) of each range of bits without a jump.

        A budget chooses among these; none: the rule cannot follow a budget.
        """
        return ()
