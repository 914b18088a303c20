"""Iterative hard thresholding: the solver moves reserved entries to where they matter most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import check_choice
from claq_exp.quantize.allocation import COLUMN, STEPS, Thresholding
from claq_exp.quantize.reservation.ratio import TopColumns
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Iht(TopColumns):
    """Keep `ratio` of the entries, of all those of the matrix, as the solver finds them to matter.

    The solver starts from the entries of `reservation=hessian` with the same fields.  Between two
    sweeps it lets the largest entries of a gradient step be the reserved ones.  There are as many
    as before, and no column has so many that their number takes more bits than at the start, so
    that a matrix takes no more bits than planned.

    whole_columns: whole columns stay, at first those of largest saliency; `select`, `top_columns`
        and `boost` mean nothing then.
    step: column, 1 / (2 H_jj) in column j, and an entry counts by what it takes off the loss; or
        matrix, 1 / (2 lambda_max(H)), and an entry counts by its size, as in the paper.

    Source: QuantEase (arXiv 2309.01885), outlier-aware QuantEase, and its structured variant.
    There reserved entries are added to quantized ones; here they take their place.
    """

    whole_columns: bool = False
    step: str = COLUMN

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reservation.step", self.step, STEPS)

    @property
    def thresholding(self) -> Thresholding:
        """How the solver moves the entries, see Reservation."""
        return Thresholding(self.whole_columns, self.step)

    def order(self, statistics: ColumnStatistics) -> Tensor:
        """Return the columns from largest to smallest saliency: [in] int64."""
        return statistics.saliency_order()

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the number of entries that the solver starts with in each column: [in] int64."""
        if not self.whole_columns:
            return super().plan(statistics)
        rows, columns = statistics.shape
        counts = torch.zeros(columns, dtype=torch.int64)
        counts[self.order(statistics)[: round(self._tails() * self.ratio * columns)]] = rows
        return counts
