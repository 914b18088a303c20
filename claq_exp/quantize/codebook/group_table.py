"""A learned table of levels for each matrix, and a scale for each row and group of columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numba import njit, uintp
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError, one_of
from claq_exp.payload.group_table import SCALE_BITS, GroupTable, GroupTableLayout, RowIntegers
from claq_exp.payload.stored import HALF, HALF_MAX
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
    search_scales,
)
from claq_exp.quantize.statistics import ColumnStatistics

LEARNED_ON = 1 << 16  # numbers of a matrix that its table is learned on
MEASURED_ON = 1 << 15  # the same, where only its error is asked for


@dataclass(frozen=True)
class GroupTableCodebook(Codebook):
    """One table of 2^b levels for a matrix, learned by weighted k-means of its scaled entries.

    w = s * t[q].  Table and scales lower the squared error, every column weighted by what an error
    in it costs (the solver's distortion weight); a scale may be negative, so that the table may
    have more levels on one side.  Both are fixed before compensation ("static groups"), and cost no
    column index under act-order.
    Beyond llama.cpp's IQ4_NL, whose table is always the same.

    group_size: neighbouring columns that share a scale.
    scale_bits: of a scale: 16, a float16; or 4 to 8, an integer times a float16 of the row.
    """

    mixed_widths: ClassVar[bool] = False
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

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> TableColumns:
        """Learn the table and scales of a matrix; all columns have one width."""
        layout = self.layout(statistics.shape[0], plan)
        size = layout.group_size
        weight = np.ascontiguousarray(statistics.weight.numpy())
        importance, rows = statistics.column_importance().numpy(), statistics.importance().numpy()
        left_out = _left_out(weight, plan)
        some = _spread_rows(*statistics.shape, LEARNED_ON)
        mask = left_out[some] if len(left_out) else NO_MASK
        learned = learn_table(weight[some], importance, rows[some], mask, size, 2**layout.bits)
        table = torch.from_numpy(learned).half()
        levels = table.float().numpy()
        scales = np.zeros((layout.rows, layout.groups), dtype=np.float32)
        search_scales(weight, importance, left_out, levels, size, CLIPS, scales)
        found = torch.from_numpy(scales)
        if self.scale_bits == HALF:
            return TableColumns(plan, layout, table, found.half(), None)
        by_row = RowIntegers.near(found, self.scale_bits)
        integers = by_row.integers.float().numpy()
        steps, top = by_row.row_scales.float().numpy(), 2 ** (self.scale_bits - 1) - 1
        round_scales(weight, importance, left_out, levels, size, steps, top, integers)
        by_row = replace(by_row, integers=torch.from_numpy(integers).short())
        return TableColumns(plan, layout, table, by_row.scales(), by_row)

    def distortion(self, statistics: ColumnStatistics, bits: int) -> float:
        """Return about the error of a matrix at a width, measured on some of its rows.

        sum_ij g_i d_j (w_ij - q_ij)^2, with the distortion weight d of the columns and the
        importance g of the rows, before compensation and with scales as they are found.
        """
        shape, weights = statistics.shape, statistics.importance()
        some = _spread_rows(*shape, MEASURED_ON)
        # the error of a row counts as often as it weighs: a row times the root of its weight
        weight = (statistics.weight[some] * weights[some].sqrt()[:, None]).numpy()
        importance, ones = (
            statistics.column_importance().numpy(),
            np.ones(len(some), dtype=np.float32),
        )
        size = min(self.group_size, shape[1])
        table = learn_table(weight, importance, ones, NO_MASK, size, 2**bits)
        scales = np.zeros((len(some), -(-shape[1] // size)), dtype=np.float32)
        loss = search_scales(weight, importance, NO_MASK, table, size, CLIPS, scales)
        unit = float(statistics.distortion_weight.double().mean())
        return float(loss) * unit * float(weights.double().sum() / weights[some].double().sum())


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
    """Columns on a table with scales that are fixed before.

    table: [entries] float32, ascending.  scales: [groups, out] float32.  group_size: columns that
    share a scale.  offsets: [in + 1] int64, where a column's reserved entries go.  tails,
    placed: as of `ColumnTask`.

    codes: [in, out] uint8, rows: [reserved] int64 and kept: [reserved] float32 are written.
    """

    table: NDArray[np.float32]
    scales: NDArray[np.float32]
    group_size: int
    offsets: NDArray[np.int64]
    tails: bool
    placed: bool
    codes: NDArray[np.uint8]
    rows: NDArray[np.int64]
    kept: NDArray[np.float32]


@codes(TableTask)
@njit(cache=True, nogil=True, error_model="numpy")
def code_on_table(values, column, task, quantized):  # type: ignore[no-untyped-def]
    """Reserve entries of a column and code it on the table, see `code_column`."""
    rows = len(values)
    chosen = np.empty(rows, dtype=np.bool_)
    start, stop = task.offsets[column], task.offsets[column + 1]
    if task.placed:
        mark_placed(task.rows[start:stop], chosen)
    else:
        choose_reserved(values, stop - start, task.tails, chosen)
    scale, written = task.scales[column // task.group_size], task.codes[column]
    for row in range(rows):
        quantized[row] = values[row] / scale[row] if scale[row] != 0 else np.float32(0.0)
    assign_codes(quantized, task.table, written)
    if stop > start:
        keep_reserved(values, chosen, start, written, task)
    for row in range(rows):
        kept = task.table[uintp(written[row])] * scale[row]
        kept = min(max(kept, np.float32(-HALF_MAX)), np.float32(HALF_MAX))
        quantized[row] = round_half(values[row]) if chosen[row] else kept


class TableColumns(ColumnQuantizer):
    """The codes found so far on a table, and its scales.

    table, scales, by_row: as of `GroupTable`.
    """

    def __init__(
        self,
        plan: ColumnPlan,
        layout: GroupTableLayout,
        table: Tensor,
        scales: Tensor,
        by_row: RowIntegers | None,
    ) -> None:
        self._plan, self._planned, self._layout = plan, plan, layout
        self._table, self._scales, self._by_row = table, scales, by_row
        offsets = np.zeros(layout.columns + 1, dtype=np.int64)
        np.cumsum(plan.reserved_counts.numpy(), out=offsets[1:])
        self._task = TableTask(
            table=table.float().numpy(),
            scales=np.ascontiguousarray(scales.float().numpy().T),
            group_size=layout.group_size,
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
        """Return codes, table and scales, and the entries that stay in float16."""
        task, counts = self._task, self._plan.reserved_counts
        kept = torch.from_numpy(task.kept).half()
        return GroupTable(
            torch.from_numpy(task.codes).t(),
            self._plan.column_bits,
            reserved_entries(counts, torch.from_numpy(task.rows), kept),
            self._table,
            self._scales,
            self._layout.group_size,
            self._by_row,
        )
