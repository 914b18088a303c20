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
from claq_exp.quantize.codebook.table_fit import NO_MASK
from claq_exp.quantize.codebook.table_problem import TableProblem, spread_rows, without
from claq_exp.quantize.statistics import ColumnStatistics

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
        size, grouped = layout.group_size, Grouped.of(plan.column_bits, layout.group_size)
        whole = TableProblem.of(statistics, plan)
        fits = []
        for number, width in enumerate(grouped.widths):
            part = whole.columns((grouped.which == number).numpy())
            fits.append((part, part.learned(size, 2**width)))
        found = np.concatenate([part.scales(table, size) for part, table in fits], axis=1)
        scales, tables = torch.from_numpy(found), [table for _, table in fits]
        if self.scale_bits == HALF:
            return TableColumns(plan, layout, tables, scales.half(), None)
        by_row = RowIntegers.near(scales, self.scale_bits)
        integers, first = by_row.integers.float().numpy(), 0
        steps, top = by_row.row_scales.float().numpy(), 2 ** (self.scale_bits - 1) - 1
        for part, table in fits:
            groups = slice(first, first + part.groups(size))
            integers[:, groups] = part.integers(table, size, steps, top, integers[:, groups])
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
        some = spread_rows(*shape, MEASURED_ON)
        # the error of a row counts as often as it weighs: a row times the root of its weight
        weight = (statistics.weight[some] * weights[some].sqrt()[:, None]).numpy()
        largest = np.argsort(-statistics.weight[some].abs().numpy(), axis=0, kind="stable")
        ones, size = np.ones(len(some), dtype=np.float32), min(self.group_size, shape[1])
        alike = TableProblem(weight, statistics.column_importance().numpy(), ones, NO_MASK)
        found = np.empty((shape[1], len(options)))
        for width in np.unique(options[:, 0]).tolist():
            table = alike.learned(size, 2**width, SKETCHED_ON)
            misses = np.take_along_axis(alike.misses(table, size), largest, axis=0)
            for place in np.flatnonzero(options[:, 0] == width).tolist():
                found[:, place] = without(misses, options[place, 1] * len(some) / shape[0])
        return found * float(weights.double().sum() / weights[some].double().sum())


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
