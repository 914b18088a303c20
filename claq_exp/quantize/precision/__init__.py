"""Which columns get how many bits."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from claq_exp.quantize.precision.fixed import Fixed
from claq_exp.quantize.precision.outlier_order import OutlierOrder
from claq_exp.quantize.precision.rate_distortion import RateDistortion
from claq_exp.quantize.statistics import ColumnStatistics


class Precision(Protocol):
    """A rule for code widths; its plan depends on its arguments and fields alone."""

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the code width of each column: [in] uint8, each from 1 to 8."""


PRECISION: dict[str, type] = {"fixed": Fixed, "outlier_order": OutlierOrder, "rate_distortion": RateDistortion}
