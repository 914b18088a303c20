"""Which columns get how many bits."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from claq_exp.quantize.precision.claq_reference import ClaqReference
from claq_exp.quantize.precision.fixed import Fixed
from claq_exp.quantize.precision.hessian import Hessian
from claq_exp.quantize.precision.layer_map import LayerMap
from claq_exp.quantize.precision.magnitude import Magnitude
from claq_exp.quantize.precision.none import NoPrecision
from claq_exp.quantize.precision.outlier_order import OutlierOrder
from claq_exp.quantize.precision.random import Random
from claq_exp.quantize.statistics import ColumnStatistics


class Precision(Protocol):
    """A rule for code widths; its plan depends on its arguments and fields alone.

    A rule by which how many columns get which width follows from a layer's name also has
    `plan_key(name)`, which returns what of the name counts.
    """

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the code width of each column: [in] uint8, each from 1 to 8."""


PRECISION: dict[str, type] = {
    "fixed": Fixed,
    "outlier_order": OutlierOrder,
    "hessian": Hessian,
    "magnitude": Magnitude,
    "random": Random,
    "layer_map": LayerMap,
    "none": NoPrecision,
    "claq_reference": ClaqReference,
}
