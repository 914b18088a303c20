"""How many entries of each column stay in 16 bits; the solver keeps those of largest magnitude."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from claq_exp.quantize.reservation.fixed import Fixed
from claq_exp.quantize.reservation.none import NoReservation
from claq_exp.quantize.reservation.outlier_order import OutlierOrder
from claq_exp.quantize.statistics import ColumnStatistics


class Reservation(Protocol):
    """A rule for reserved counts; its plan depends on its arguments and fields alone."""

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of reserved entries of each column: [in] int64, at most `out` each."""


RESERVATION: dict[str, type] = {
    "none": NoReservation,
    "fixed": Fixed,
    "outlier_order": OutlierOrder,
}
