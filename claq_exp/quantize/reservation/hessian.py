"""Outlier reservation by saliency: columns whose rounding costs more keep a larger share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from claq_exp.quantize.reservation.ratio import TopColumns
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Hessian(TopColumns):
    """Keep a larger share in the columns of largest OBS saliency mean_i(W_ij^2) / U_jj^2.

    U is the upper Cholesky factor of the inverse Hessian.
    """

    def order(self, statistics: ColumnStatistics) -> Tensor:
        """Return the columns from largest to smallest saliency: [in] int64."""
        return statistics.saliency_order()
