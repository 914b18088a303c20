"""The columns of one width of a matrix, for which a table and scales are sought."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.basics import choose_reserved
from claq_exp.quantize.codebook.table_fit import (
    CLIPS,
    NO_MASK,
    learn_table,
    round_scales,
    round_to_table,
    search_scales,
)
from claq_exp.quantize.statistics import ColumnStatistics

LEARNED_ON = 1 << 16  # numbers of a matrix that a table is learned on


class TableProblem(NamedTuple):
    """Columns that get a table and scales.

    weight: [out, in] float32.  importance: [in] float32.  rows: [out] float32, importance of the
    rows.  left_out: [out, in] bool, entries that do not count; a 0 x 0 array where all do.
    """

    weight: NDArray[np.float32]
    importance: NDArray[np.float32]
    rows: NDArray[np.float32]
    left_out: NDArray[np.bool_]

    @staticmethod
    def of(statistics: ColumnStatistics, plan: ColumnPlan) -> TableProblem:
        """Return all columns of a matrix, without the entries that a plan reserves."""
        weight = np.ascontiguousarray(statistics.weight.numpy())
        importance, rows = statistics.column_importance().numpy(), statistics.importance().numpy()
        return TableProblem(weight, importance, rows, _left_out(weight, plan))

    def columns(self, own: NDArray[np.bool_]) -> TableProblem:
        """Return some of the columns: [in] bool."""
        if own.all():
            return self
        mask = np.ascontiguousarray(self.left_out[:, own]) if len(self.left_out) else NO_MASK
        weight = np.ascontiguousarray(self.weight[:, own])
        return TableProblem(weight, self.importance[own], self.rows, mask)

    def groups(self, size: int) -> int:
        """Return how many groups of so many columns there are."""
        return -(-self.weight.shape[1] // size)

    def learned(self, size: int, entries: int, numbers: int = LEARNED_ON) -> NDArray[np.float32]:
        """Learn a table on so many numbers; its levels are those of float16."""
        rows, columns = self.weight.shape
        some = spread_rows(rows, columns, numbers)
        mask = self.left_out[some] if len(self.left_out) else NO_MASK
        given = self.weight[some], self.importance, self.rows[some], mask
        return learn_table(*given, size, entries).astype(np.float16).astype(np.float32)

    def scales(self, table: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        """Return the best scales: [out, groups]."""
        scales = np.zeros((len(self.weight), self.groups(size)), dtype=np.float32)
        search_scales(self.weight, self.importance, self.left_out, table, size, CLIPS, scales)
        return scales

    def integers(
        self,
        table: NDArray[np.float32],
        size: int,
        steps: NDArray[np.float32],
        top: int,
        near: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return the best integers of scales next to given ones: [out, groups]."""
        integers = np.ascontiguousarray(near)
        given = self.weight, self.importance, self.left_out
        round_scales(*given, table, size, steps, top, integers)
        return integers

    def misses(self, table: NDArray[np.float32], size: int) -> NDArray[np.float64]:
        """Return the squared error of each weight at its best scale and code: [out, in]."""
        rounded = np.empty_like(self.weight)
        round_to_table(self.weight, table, size, self.scales(table, size), rounded)
        return np.square(self.weight - rounded, dtype=np.float64)


def without(misses: NDArray[np.float64], left_out: float) -> NDArray[np.float64]:
    """Return the sum of each column without its first entries: [out, in] -> [in] float64.

    left_out: how many, and what share of the next one.
    """
    whole = int(left_out)
    if whole >= len(misses):
        return np.zeros(misses.shape[1])
    return np.asarray(misses[whole:].sum(axis=0) - (left_out - whole) * misses[whole])


def spread_rows(rows: int, columns: int, numbers: int) -> NDArray[np.int64]:
    """Return rows that are spread over a matrix, with about so many numbers."""
    count = max(1, min(rows, numbers // columns))
    return np.linspace(0, rows - 1, count).round().astype(np.int64)


def _left_out(weight: NDArray[np.float32], plan: ColumnPlan) -> NDArray[np.bool_]:
    """Return the entries that would be reserved of the weight as it is; a 0 x 0 array for none."""
    if not int(plan.reserved_counts.sum()):
        return NO_MASK
    chosen = np.zeros(weight.shape[::-1], dtype=np.bool_)
    for column, count in enumerate(plan.reserved_counts.tolist()):
        values = np.ascontiguousarray(weight[:, column])
        choose_reserved(values, count, plan.select == "tails", chosen[column])
    return np.ascontiguousarray(chosen.T)
