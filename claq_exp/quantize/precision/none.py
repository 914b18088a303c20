"""No precision: the widths of a matrix are decided with those of all others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.precision.base import Precision
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class NoPrecision(Precision):
    """Leave the widths to an allocation over the whole model."""

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Raise ConfigError, for nothing is decided matrix by matrix."""
        raise ConfigError(
            "precision=none leaves the widths to an allocation; choose allocation=rate_distortion, "
            "or another precision"
        )
