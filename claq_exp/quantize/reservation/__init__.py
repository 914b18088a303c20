"""How many entries of each column stay in 16 bits, and by which rule the solver picks them."""

from __future__ import annotations

from claq_exp.quantize.reservation.base import Reservation as Reservation
from claq_exp.quantize.reservation.claq_reference import ClaqReference
from claq_exp.quantize.reservation.fixed import Fixed
from claq_exp.quantize.reservation.hessian import Hessian
from claq_exp.quantize.reservation.iht import Iht
from claq_exp.quantize.reservation.none import NoReservation
from claq_exp.quantize.reservation.outlier_order import OutlierOrder
from claq_exp.quantize.reservation.random import Random

RESERVATION: dict[str, type] = {
    "none": NoReservation,
    "fixed": Fixed,
    "outlier_order": OutlierOrder,
    "hessian": Hessian,
    "iht": Iht,
    "random": Random,
    "claq_reference": ClaqReference,
}
