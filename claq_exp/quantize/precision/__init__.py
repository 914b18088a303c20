"""Which columns get how many bits."""

from __future__ import annotations

from claq_exp.quantize.precision.base import Precision as Precision
from claq_exp.quantize.precision.claq_reference import ClaqReference
from claq_exp.quantize.precision.fixed import Fixed
from claq_exp.quantize.precision.hessian import Hessian
from claq_exp.quantize.precision.layer_map import LayerMap
from claq_exp.quantize.precision.magnitude import Magnitude
from claq_exp.quantize.precision.none import NoPrecision
from claq_exp.quantize.precision.outlier_order import OutlierOrder
from claq_exp.quantize.precision.random import Random

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
