"""No allocation: each matrix is planned by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from claq_exp.allocate.allocation import Allocation


@dataclass(frozen=True)
class NoAllocation(Allocation):
    """Leave widths and outliers to precision and reservation, matrix by matrix."""

    decides: ClassVar[bool] = False
