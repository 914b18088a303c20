"""How bits are given out over a whole model, before its first layer is quantized."""

from __future__ import annotations

from claq_exp.allocate.allocation import Allocation, Survey
from claq_exp.allocate.none import NoAllocation
from claq_exp.allocate.rate_distortion import RateDistortion

ALLOCATION: dict[str, type] = {
    "none": NoAllocation,
    "rate_distortion": RateDistortion,
}

__all__ = ["ALLOCATION", "Allocation", "NoAllocation", "RateDistortion", "Survey"]
