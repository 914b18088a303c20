"""Hard thresholds: the entries, or whole columns, of largest score in a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.quantize.allocation import MATRIX, ColumnPlan

POWERS = 50  # steps of the power iteration


@dataclass(frozen=True)
class Thresholds:
    """How many entries are reserved.

    count: in all.  most: in a column.  whole_columns: all of a column or none.
    by_matrix: a step of the gradient is the same for all columns.
    """

    count: int
    most: int
    whole_columns: bool
    by_matrix: bool

    @staticmethod
    def of(plan: ColumnPlan) -> Thresholds | None:
        """Return those of a plan; None where the reserved entries stay, or there are none."""
        how, count = plan.thresholding, int(plan.reserved_counts.sum())
        if how is None or not count:
            return None
        return Thresholds(count, plan.most_reserved, how.whole_columns, how.step == MATRIX)

    def largest(self, scores: Tensor) -> Tensor:
        """Return the entries to reserve: [in, out] float32, none negative -> [in, out] bool.

        Of all choices with `count` entries, and at most `most` in a column, that of largest sum;
        for whole columns, as many as have so many entries.  Ties go to the first column.
        """
        chosen = torch.zeros(scores.shape, dtype=torch.bool)
        rows = scores.shape[1]
        if self.whole_columns:
            sums = scores.sum(dim=1, dtype=torch.float64)
            chosen[sums.argsort(descending=True, stable=True)[: self.count // rows]] = True
            return chosen
        values, places = scores.topk(min(self.most, rows), dim=1)
        order = values.reshape(-1).argsort(descending=True, stable=True)[: self.count]
        columns = order // values.shape[1]
        chosen[columns, places.reshape(-1)[order]] = True
        return chosen


def largest_eigenvalue(matrix: Tensor) -> float:
    """Return about the largest eigenvalue of a positive definite matrix, by power iteration.

    matrix: [n, n] float32.  Starts from the column of the largest diagonal entry.
    """
    vector, value = matrix[int(matrix.diagonal().argmax())].clone(), 0.0
    for _ in range(POWERS):
        vector /= vector.norm()
        product = matrix @ vector
        value = float(vector @ product)
        vector = product
    return value
