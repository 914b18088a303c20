"""How many entries of each column stay in 16 bits, and by which rule the solver picks them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from claq_exp.quantize.reservation.claq_reference import ClaqReference
from claq_exp.quantize.reservation.fixed import Fixed
from claq_exp.quantize.reservation.hessian import Hessian
from claq_exp.quantize.reservation.none import NoReservation
from claq_exp.quantize.reservation.outlier_order import OutlierOrder
from claq_exp.quantize.reservation.random import Random
from claq_exp.quantize.statistics import ColumnStatistics


class Reservation(Protocol):
    """A rule for reserved counts; its plan depends on its arguments and fields alone.

    A rule may have an attribute `select` (magnitude or tails: which entries of a column stay;
    without it, those of largest magnitude) and, where its counts follow from a layer's name,
    `plan_key(name)`, which returns what of the name counts.
    """

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64, at most `out` each."""


RESERVATION: dict[str, type] = {
    "none": NoReservation,
    "fixed": Fixed,
    "outlier_order": OutlierOrder,
    "hessian": Hessian,
    "random": Random,
    "claq_reference": ClaqReference,
}
