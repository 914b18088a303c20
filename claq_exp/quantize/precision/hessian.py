"""Adaptive precision by saliency: what rounding a column costs the layer's output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from claq_exp.quantize.precision.two_widths import TwoWidths
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Hessian(TwoWidths):
    """Give the higher width to the columns of largest OBS saliency mean_i(W_ij^2) / U_jj^2.

    U is the upper Cholesky factor of the inverse Hessian.  Source: the alternative metric of CLAQ's
    reference code (its option `--inputhes`).
    """

    def order(self, statistics: ColumnStatistics) -> Tensor:
        """Return the columns from largest to smallest saliency: [in] int64."""
        return statistics.saliency_order()
