"""Learned tables of levels for each matrix, and a scale for each row and group of columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numba import njit, uintp
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError, one_of
from claq_exp.payload.group_table import (
    SCALE_BITS,
    Grouped,
    GroupTable,
    GroupTableLayout,
    RowIntegers,
)
from claq_exp.payload.stored import HALF, HALF_MAX, MAX_BITS
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook, ColumnQuantizer
from claq_exp.quantize.codebook.basics import assign_codes, choose_reserved, round_half
from claq_exp.quantize.codebook.columns import placed, reserved_entries
from claq_exp.quantize.codebook.compiled import codes, keep_reserved, mark_placed
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
MEASURED_ON = 1 << 17  # numbers that the errors of options are measured on
SKETCHED_ON = 1 << 15  # of these, those that their tables are learned on


@dataclass(frozen=True)
class GroupTableCodebook(Codebook):
    """One table of 2^b levels for each width of a matrix, by weighted k-means of scaled entries.

    w = s * t[q].  Tables and scales lower the squared error, every column weighted by what an error
    in it costs (the solver's distortion weight); a scale may be negative, so that a table may have
    more levels on one side.  Both are fixed before compensation ("static groups"), and cost no
    column index under act-order.
    Beyond llama.cpp's IQ4_NL, whose table is always the same.

    group_size: neighbours among the columns of one width that share a scale.
    scale_bits: of a scale: 16, a float16; or 4 to 8, an integer times a float16 of the row.
    """

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True
    holds_levels: ClassVar[bool] = True

    group_size: int = 32
    scale_bits: int = HALF

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ConfigError(
                f"codebook.group_size is {self.group_size}; give a positive number of columns"
            )
        if self.scale_bits not in SCALE_BITS:
            known = [str(bits) for bits in SCALE_BITS]
            raise ConfigError(one_of("codebook.scale_bits", str(self.scale_bits), known))

    def layout(self, rows: int, plan: ColumnPlan) -> GroupTableLayout:
        """Return how a matrix of so many rows is stored with a plan."""
        return GroupTableLayout.of(
            *(rows, plan.column_bits, plan.reserved_counts),
            group_size=min(self.group_size, len(plan.column_bits)),
            scale_bits=self.scale_bits,
        )

    @property
    def widest(self) -> int:
        """The bits of the longest codes that there can be."""
        return MAX_BITS

    def column_bits(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bits of a column beside its codes, by its width: none, [any] each."""
        return np.zeros_like(widths)

    def fixed_bits(self, rows: int, columns: int) -> int:
        """Return about what a matrix stores beside its columns."""
        groups = -(-columns // min(self.group_size, columns))
        by_row = HALF if self.scale_bits < HALF else 0
        return rows * (groups * self.scale_bits + by_row)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> TableColumns:
        """Learn the tables and scales of a matrix."""
        layout = self.layout(statistics.shape[0], plan)
        grouped = Grouped.of(plan.column_bits, layout.group_size)
        problem = _Problem.of(statistics, plan)
        parts = [
            problem.columns((grouped.which == at).numpy()) for at in range(len(grouped.widths))
        ]
        tables = [
            part.learned(layout.group_size, 2**width)
            for part, width in zip(parts, grouped.widths, strict=True)
        ]
        fits = list(zip(parts, tables, strict=True))
        found = np.concatenate([part.scales(table, layout.group_size) for part, table in fits], 1)
        scales = torch.from_numpy(found)
        if self.scale_bits == HALF:
            return TableColumns(plan, layout, tables, scales.half(), None)
        by_row = RowIntegers.near(scales, self.scale_bits)
        integers, first = by_row.integers.float().numpy(), 0
        steps, top = by_row.row_scales.float().numpy(), 2 ** (self.scale_bits - 1) - 1
        for part, table in fits:
            groups = slice(first, first + part.groups(layout.group_size))
            integers[:, groups] = part.rounded(
                table, layout.group_size, steps, top, integers[:, groups]
            )
            first = groups.stop
        by_row = replace(by_row, integers=torch.from_numpy(integers).short())
        return TableColumns(plan, layout, tables, by_row.scales(), by_row)

    def distortions(
        self, statistics: ColumnStatistics, options: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return about the error of each column at each option, measured on some of the rows.

        options: [n, 2] int64, width and reserved count.  Returns [in, n]: sum_i g_i (w_ij - q_ij)^2
        with the importance g of the rows, before compensation, where all columns have one width and
        scales are as they are found.
        """
        shape, weights = statistics.shape, statistics.importance()
        some = _spread_rows(*shape, MEASURED_ON)
        # the error of a row counts as often as it weighs: a row times the root of its weight
        weight = (statistics.weight[some] * weights[some].sqrt()[:, None]).numpy()
        largest = np.argsort(-statistics.weight[some].abs().numpy(), axis=0, kind="stable")
        importance = statistics.column_importance().numpy()
        found = np.empty((shape[1], len(options)))
        for width in np.unique(options[:, 0]).tolist():
            misses = np.take_along_axis(self._misses(weight, importance, width), largest, axis=0)
            for place in np.flatnonzero(options[:, 0] == width).tolist():
                found[:, place] = _without(misses, options[place, 1] * len(some) / shape[0])
        return found * float(weights.double().sum() / weights[some].double().sum())

    def _misses(
        self, weight: NDArray[np.float32], importance: NDArray[np.float32], width: int
    ) -> NDArray[np.float64]:
        """Return the squared error of each weight where all columns have one width: [out, in]."""
        alike = _Problem(weight, importance, np.ones(len(weight), dtype=np.float32), NO_MASK)
        size = min(self.group_size, weight.shape[1])
        table = alike.learned(size, 2**width, SKETCHED_ON)
        rounded = np.empty_like(weight)
        round_to_table(weight, table, size, alike.scales(table, size), rounded)
        return np.square(weight - rounded, dtype=np.float64)


class _Problem(NamedTuple):
    """Columns that get a table and scales.

    weight: [out, in] float32.  importance: [in] float32.  rows: [out] float32, importance of the
    rows.  left_out: [out, in] bool, entries that do not count; a 0 x 0 array where all do.
    """

    weight: NDArray[np.float32]
    importance: NDArray[np.float32]
    rows: NDArray[np.float32]
    left_out: NDArray[np.bool_]

    @staticmethod
    def of(statistics: ColumnStatistics, plan: ColumnPlan) -> _Problem:
        weight = np.ascontiguousarray(statistics.weight.numpy())
        importance, rows = statistics.column_importance().numpy(), statistics.importance().numpy()
        return _Problem(weight, importance, rows, _left_out(weight, plan))

    def columns(self, own: NDArray[np.bool_]) -> _Problem:
        """Return some of the columns: [in] bool."""
        if own.all():
            return self
        mask = np.ascontiguousarray(self.left_out[:, own]) if len(self.left_out) else NO_MASK
        weight = np.ascontiguousarray(self.weight[:, own])
        return _Problem(weight, self.importance[own], self.rows, mask)

    def groups(self, size: int) -> int:
        """Return how many groups of so many columns there are."""
        return -(-self.weight.shape[1] // size)

    def learned(self, size: int, entries: int, numbers: int = LEARNED_ON) -> NDArray[np.float32]:
        """Learn a table on so many numbers; its levels are those of float16."""
        rows, columns = self.weight.shape
        some = _spread_rows(rows, columns, numbers)
        mask = self.left_out[some] if len(self.left_out) else NO_MASK
        given = self.weight[some], self.importance, self.rows[some], mask
        return learn_table(*given, size, entries).astype(np.float16).astype(np.float32)

    def scales(self, table: NDArray[np.float32], size: int) -> NDArray[np.float32]:
        """Return the best scales: [out, groups]."""
        scales = np.zeros((len(self.weight), self.groups(size)), dtype=np.float32)
        search_scales(self.weight, self.importance, self.left_out, table, size, CLIPS, scales)
        return scales

    def rounded(
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


def _without(misses: NDArray[np.float64], left_out: float) -> NDArray[np.float64]:
    """Return the sum of each column without its first entries: [out, in] -> [in] float64.

    left_out: how many, and what share of the next one.
    """
    whole = int(left_out)
    if whole >= len(misses):
        return np.zeros(misses.shape[1])
    return np.asarray(misses[whole:].sum(axis=0) - (left_out - whole) * misses[whole])


def _spread_rows(rows: int, columns: int, numbers: int) -> NDArray[np.int64]:
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


class TableTask(NamedTuple):
    """Columns on tables with scales that are fixed before.

    levels: [widths, most] float32, the table of each width, ascending; what is beyond its entries
        counts for nothing.
    entries: [widths] int64.
    which: [in] int64, the table of each column.
    scales: [groups, out] float32.
    group_of: [in] int64.
    offsets: [in + 1] int64, where a column's reserved entries go.
    tails, placed: as of `ColumnTask`.

    codes: [in, out] uint8, rows: [reserved] int64 and kept: [reserved] float32 are written.
    """

    levels: NDArray[np.float32]
    entries: NDArray[np.int64]
    which: NDArray[np.int64]
    scales: NDArray[np.float32]
    group_of: NDArray[np.int64]
    offsets: NDArray[np.int64]
    tails: bool
    placed: bool
    codes: NDArray[np.uint8]
    rows: NDArray[np.int64]
    kept: NDArray[np.float32]


@codes(TableTask)
@njit(cache=True, nogil=True, error_model="numpy")
def code_on_table(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Reserve entries of a column and code it on its table, see `code_column`."""
    rows = len(values)
    chosen = np.empty(rows, dtype=np.bool_)
    start, stop = task.offsets[column], task.offsets[column + 1]
    if task.placed:
        mark_placed(task.rows[start:stop], chosen)
    else:
        choose_reserved(values, stop - start, task.tails, chosen)
    scale, written = task.scales[task.group_of[column]], task.codes[column]
    table = task.levels[task.which[column], : task.entries[task.which[column]]]
    for row in range(rows):
        quantized[row] = values[row] / scale[row] if scale[row] != 0 else np.float32(0.0)
    assign_codes(quantized, table, written)
    if stop > start:
        keep_reserved(values, chosen, start, written, task)
    for row in range(rows):
        kept = table[uintp(written[row])] * scale[row]
        kept = min(max(kept, np.float32(-HALF_MAX)), np.float32(HALF_MAX))
        quantized[row] = round_half(values[row]) if chosen[row] else kept


class TableColumns(ColumnQuantizer):
    """The codes found so far on tables, and the scales.

    tables: [entries] float32 each, of numbers that float16 holds, the narrowest first.
    scales, by_row: as of `GroupTable`.
    """

    def __init__(
        self,
        plan: ColumnPlan,
        layout: GroupTableLayout,
        tables: list[NDArray[np.float32]],
        scales: Tensor,
        by_row: RowIntegers | None,
    ) -> None:
        self._plan, self._planned, self._layout = plan, plan, layout
        self._tables, self._scales, self._by_row = tables, scales, by_row
        grouped = Grouped.of(plan.column_bits, layout.group_size)
        levels = np.zeros((len(tables), len(tables[-1])), dtype=np.float32)
        for own, table in zip(levels, tables, strict=True):
            own[: len(table)] = table
        offsets = np.zeros(layout.columns + 1, dtype=np.int64)
        np.cumsum(plan.reserved_counts.numpy(), out=offsets[1:])
        self._task = TableTask(
            levels=levels,
            entries=np.array([len(table) for table in tables], dtype=np.int64),
            which=grouped.which.numpy(),
            scales=np.ascontiguousarray(scales.float().numpy().T),
            group_of=grouped.group_of.numpy(),
            offsets=offsets,
            tails=plan.select == "tails",
            placed=False,
            codes=np.zeros((layout.columns, layout.rows), dtype=np.uint8),
            rows=np.zeros(offsets[-1], dtype=np.int64),
            kept=np.zeros(offsets[-1], dtype=np.float32),
        )

    def compiled(self) -> TableTask:
        """Return the task of the compiled step."""
        return self._task

    def code_column(self, column: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Code a column, see ColumnQuantizer."""
        quantized = np.empty_like(values)
        code_on_table(values, column, self._task, quantized)
        return quantized

    def hold(self, held: bool = True) -> None:
        """Do nothing: table and scales are fixed before, see ColumnQuantizer."""

    def reserve(self, places: Tensor | None) -> None:
        """Reserve these entries, see ColumnQuantizer."""
        self._plan, self._task = placed(places, self._planned, self._task)

    def payload(self) -> GroupTable:
        """Return codes, tables and scales, and the entries that stay in float16."""
        task, counts = self._task, self._plan.reserved_counts
        kept = torch.from_numpy(task.kept).half()
        return GroupTable(
            torch.from_numpy(task.codes).t(),
            self._plan.column_bits,
            reserved_entries(counts, torch.from_numpy(task.rows), kept),
            torch.from_numpy(np.concatenate(self._tables)).half(),
            self._scales,
            self._layout.group_size,
            self._by_row,
        )
