"""Signs and a magnitude of rank one: where OneBit starts its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.payload.sign_scales import SignScales, SignScalesLayout
from claq_exp.payload.stored import HALF_MAX
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook
from claq_exp.quantize.codebook.columns import PythonColumns
from claq_exp.quantize.statistics import ColumnStatistics

ROUNDS = 200  # of the power iteration, at most
SETTLED = 1e-7  # change of the unit vector at which it stops


@dataclass(frozen=True)
class Svid(Codebook):
    """Store sign(w) and the best approximation of |W| by one column times one row.

    The largest singular value and its vectors give |W| ~ a b^T with a, b >= 0, and w = sign * a_i *
    b_j.  Scales are fixed before compensation; signs follow the compensated weights, which under
    solver=nearest are the weights themselves.
    Source: OneBit's sign-value-independent decomposition (arXiv 2402.11295, section 3.2), without
    the training that follows there.
    """

    mixed_widths: ClassVar[bool] = False
    reserves: ClassVar[bool] = False
    holds_levels: ClassVar[bool] = True
    bits: ClassVar[int] = 1

    def check(self, bits: int) -> None:
        """Raise ConfigError for another width than that of a sign."""
        if bits != self.bits:
            raise ConfigError(
                f"codebook=svid stores a sign of 1 bit for each weight, not {bits} bits; use "
                "precision=fixed precision.bits=1"
            )

    def layout(self, rows: int, plan: ColumnPlan) -> SignScalesLayout:
        """Return how a matrix of so many rows is stored with a plan."""
        return SignScalesLayout(rows=rows, columns=len(plan.column_bits))

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> SignColumns:
        """Begin a matrix."""
        return SignColumns(statistics, plan)


class SignColumns(PythonColumns):
    """The signs found so far, and the scales that were fixed before."""

    def __init__(self, statistics: ColumnStatistics, plan: ColumnPlan) -> None:
        super().__init__(statistics, plan)
        rows, columns = magnitude(statistics.weight)
        self._row_scales, self._column_scales = rows.half(), columns.half()
        self._rows = self._row_scales.float().numpy()
        self._columns = self._column_scales.float().numpy()

    def quantize(
        self, column: int, values: NDArray[np.float32], reserved: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Take the signs of a column; see PythonColumns."""
        positive = values >= 0
        sizes = (self._columns[column] * self._rows).clip(max=HALF_MAX)  # as dequantizing cuts it
        return positive.astype(np.uint8), np.where(positive, sizes, -sizes)

    def hold(self, held: bool = True) -> None:
        """Do nothing: the scales are fixed before, see ColumnQuantizer."""

    def payload(self) -> SignScales:
        """Return signs and scales."""
        return SignScales(*self.coded(), self._column_scales, self._row_scales)


def magnitude(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a [out] and b [in], float32 and not negative, with a b^T nearest to |W| by squares.

    weight: [out, in] float32.  By power iteration: |W| has no negative entry, so that its first
    singular vectors have none either (Perron and Frobenius), and begins at the mean row.  Both
    have the same norm.
    """
    sizes = weight.abs()
    columns = sizes.mean(dim=0, dtype=torch.float64)
    if not float(columns.norm()) > 0:
        return torch.zeros(weight.shape[0]), torch.zeros(weight.shape[1])
    columns /= columns.norm()
    rows = torch.zeros(weight.shape[0], dtype=torch.float64)
    for _ in range(ROUNDS):
        rows = (sizes @ columns.float()).double()
        rows /= rows.norm()
        found = (sizes.t() @ rows.float()).double()
        found /= found.norm()
        change = float((found - columns).norm())
        columns = found
        if change <= SETTLED:
            break
    value = float((sizes @ columns.float()).double() @ rows)
    root = max(value, 0.0) ** 0.5
    return (root * rows).float(), (root * columns).float()
