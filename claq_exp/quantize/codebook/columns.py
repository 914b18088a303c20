"""The quantizers that a codebook starts for a matrix: compiled ones, and ones written in Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import NumericalError
from claq_exp.number_formats.level_sets import level_set
from claq_exp.payload.base import Payload
from claq_exp.payload.column_codebooks import ColumnCodebooks
from claq_exp.payload.columns import Reserved
from claq_exp.payload.shared_codebooks import SharedCodebooks
from claq_exp.payload.snapped_codebooks import SnappedCodebooks
from claq_exp.payload.stored import HALF_MAX
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import ColumnQuantizer, Tables
from claq_exp.quantize.codebook.basics import choose_reserved
from claq_exp.quantize.codebook.compiled import KMEANS, SETTLED, ColumnTask, code_with_levels
from claq_exp.quantize.codebook.compiled_rows import RowTask
from claq_exp.quantize.statistics import ColumnStatistics


class CompiledColumns(ColumnQuantizer):
    """Codebooks that a compiled step fits: one per column, or shared ones that it stretches.

    books: width -> [2**width] float32, ascending, for the rules that share codebooks.
    row_scales: [out] float16 or None.
    snap: name and index bits of the set that levels stand in; None where each is a float16.
    """

    def __init__(
        self,
        statistics: ColumnStatistics,
        plan: ColumnPlan,
        rule: int = KMEANS,
        *,
        books: Mapping[int, Tensor] | None = None,
        row_scales: Tensor | None = None,
        fit_reserved: bool = False,
        snap: tuple[str, int] | None = None,
    ) -> None:
        rows, columns = statistics.shape
        self._snap, self._rule = snap, rule
        self._set = torch.zeros(0) if snap is None else level_set(*snap)
        self._books = {width: book.half() for width, book in (books or {}).items()}
        self._row_scales = row_scales
        self._plan = self._planned = plan
        offsets = np.zeros(columns + 1, dtype=np.int64)
        np.cumsum(plan.reserved_counts.numpy(), out=offsets[1:])
        padded = np.zeros((9, 256), dtype=np.float32)
        for width, book in self._books.items():
            padded[width, : len(book)] = book.float().numpy()
        shares = statistics.group_shares
        if shares is None:
            shares = torch.zeros(0, columns)
        scales = np.ones(rows, dtype=np.float32)
        if row_scales is not None:
            scales = row_scales.float().numpy()
        stretched = books is not None or snap is not None
        entries = 0 if books is not None else 2 ** int(plan.column_bits.max())
        self._task = ColumnTask(
            bits=plan.column_bits.numpy(),
            offsets=offsets,
            tails=plan.select == "tails",
            placed=False,
            fit_reserved=fit_reserved,
            rule=rule,
            books=padded,
            weights=np.ascontiguousarray(statistics.importance().numpy() * scales**2),
            shares=shares.numpy(),
            row_scales=scales,
            level_set=self._set.numpy(),
            codes=np.zeros((columns, rows), dtype=np.uint8),
            levels=np.zeros((columns, entries), dtype=np.float32),
            scales=np.zeros((columns if stretched else 0, 2), dtype=np.float32),
            rows=np.zeros(offsets[-1], dtype=np.int64),
            kept=np.zeros(offsets[-1], dtype=np.float32),
        )

    def compiled(self) -> ColumnTask:
        """Return the task of the compiled step."""
        return self._task

    def code_column(self, column: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fit and code a column, see ColumnQuantizer."""
        quantized = np.empty_like(values)
        code_with_levels(values, column, self._task, quantized)
        return quantized

    def payload(self) -> ColumnCodebooks | SharedCodebooks | SnappedCodebooks:
        """Return codes, codebooks and the entries that stay in float16."""
        task, plan = self._task, self._plan
        kept = torch.from_numpy(task.kept).half()
        reserved = reserved_entries(plan.reserved_counts, torch.from_numpy(task.rows), kept)
        coded = torch.from_numpy(task.codes).t(), plan.column_bits, reserved
        if self._books:
            scales = torch.from_numpy(task.scales).half()
            return SharedCodebooks(*coded, self._books, scales, self._row_scales)
        levels = torch.from_numpy(task.levels)
        if self._snap is not None:
            scales = torch.from_numpy(task.scales[:, 0]).half()
            indices = self._indices(levels, scales.float())
            return SnappedCodebooks(*coded, indices, scales, *self._snap, self._row_scales)
        return ColumnCodebooks(*coded, levels.half(), self._row_scales)

    def _indices(self, levels: Tensor, scales: Tensor) -> Tensor:
        """Return where levels stand in their set: [in, 2**widest] uint8, 0 where there is none."""
        borders = (self._set[1:] + self._set[:-1]) / 2
        safe = torch.where(scales > 0, scales, torch.ones_like(scales))
        places = torch.bucketize(levels / safe[:, None], borders)
        used = torch.arange(levels.shape[1]) < 2 ** self._plan.column_bits[:, None].int()
        return (places * used).to(torch.uint8)

    def tables(self) -> Tables | None:
        """Return the levels of columns, where each has its own; see ColumnQuantizer."""
        if self._books or self._snap is not None:
            return None
        task = self._task
        scales = None if self._row_scales is None else self._row_scales.float()
        codes, levels = torch.from_numpy(task.codes), torch.from_numpy(task.levels)
        return Tables(False, levels, codes, free_entries(task), scales)

    def settle(self, levels: Tensor) -> None:
        """Take other levels, see ColumnQuantizer."""
        task = self._task
        used = np.arange(task.levels.shape[1]) < 2 ** task.bits[:, None].astype(int)
        ranked, rank = ascending(np.where(used, levels.numpy(), np.inf))
        task.levels[:] = np.where(used, ranked, 0)
        task.codes[:] = np.take_along_axis(rank, task.codes, axis=1)
        self._rule = SETTLED
        self._task = task._replace(rule=SETTLED, placed=True)
        clear_reserved(task)

    def hold(self, held: bool = True) -> None:
        """Keep the levels, see ColumnQuantizer; which entries are reserved may still change."""
        self._task = self._task._replace(rule=SETTLED if held else self._rule)

    def reserve(self, places: Tensor | None) -> None:
        """Reserve these entries, see ColumnQuantizer."""
        self._plan, self._task = placed(places, self._planned, self._task)


def free_entries(task: ColumnTask | RowTask) -> Tensor:
    """Return which entries are not reserved: [in, out] bool."""
    free = np.ones(task.codes.shape, dtype=np.bool_)
    free[_reserved_columns(task), task.rows] = False
    return torch.from_numpy(free)


def clear_reserved(task: ColumnTask | RowTask) -> None:
    """Give reserved entries code 0 again."""
    task.codes[_reserved_columns(task), task.rows] = 0


def _reserved_columns(task: ColumnTask | RowTask) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(task.codes)), np.diff(task.offsets))


def placed(places: Tensor | None, plan: ColumnPlan, task: Any) -> tuple[ColumnPlan, Any]:
    """Return a plan and a task that reserve given entries, [in, out] bool, or the plan's.

    task: with `offsets`, `rows`, `kept` and `placed` as those of `ColumnTask`.
    """
    counts = plan.reserved_counts if places is None else places.sum(dim=1)
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts.numpy(), out=offsets[1:])
    rows = np.zeros(offsets[-1], dtype=np.int64)
    if places is not None:
        rows[:] = places.nonzero()[:, 1].numpy()
    kept = np.zeros(offsets[-1], dtype=np.float32)
    task = task._replace(offsets=offsets, rows=rows, kept=kept, placed=places is not None)
    return replace(plan, reserved_counts=counts), task


def ascending(levels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Sort levels [tables, entries]; return them, and the new place of each."""
    order = np.argsort(levels, axis=1, kind="stable")
    rank = np.empty(order.shape, dtype=np.uint8)
    np.put_along_axis(rank, order, np.arange(order.shape[1], dtype=np.uint8)[None, :], axis=1)
    return np.take_along_axis(levels, order, axis=1), rank


def reserved_entries(counts: Tensor, rows: Tensor, values: Tensor) -> Reserved:
    """Return reserved entries.  Raises NumericalError where one does not fit float16."""
    reserved = Reserved(counts, rows, values)
    if not torch.isfinite(values).all():
        column = int(reserved.columns()[~torch.isfinite(values)][0])
        raise NumericalError(
            f"column {column} has a weight beyond float16 ({HALF_MAX:.0f}); reservation cannot "
            "keep it"
        )
    return reserved


class FixedColumns(ColumnQuantizer, ABC):
    """What quantizers have in common whose levels are fixed before, and which reserve nothing."""

    def __init__(self, rows: int, plan: ColumnPlan) -> None:
        self._plan = plan
        self._codes = np.zeros((len(plan.column_bits), rows), dtype=np.uint8)

    def hold(self, held: bool = True) -> None:
        """Do nothing: no level changes, see ColumnQuantizer."""

    def coded(self) -> tuple[Tensor, Tensor, Reserved]:
        """Return codes [out, in] uint8, their widths and no reserved entries."""
        codes = torch.from_numpy(self._codes).t()
        return codes, self._plan.column_bits, Reserved.none(len(self._codes))


class PythonColumns(ColumnQuantizer, ABC):
    """A quantizer in Python: the base for codebooks of your own.

    Much slower than the compiled rules, and open to any library.
    """

    def __init__(self, statistics: ColumnStatistics, plan: ColumnPlan) -> None:
        self.rows, columns = statistics.shape
        self._codes = np.zeros((columns, self.rows), dtype=np.uint8)
        self._plan = self._planned = plan
        self._places: Tensor | None = None
        self._kept: list[tuple[NDArray[np.int64], NDArray[np.float16]]] = [
            (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float16))
        ] * columns

    @abstractmethod
    def quantize(
        self, column: int, values: NDArray[np.float32], reserved: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return (codes, the values that they stand for) of a column as it is now: [out] each.

        `reserved` lists rows that are stored in float16 whatever is returned for them.
        """

    @abstractmethod
    def payload(self) -> Payload:
        """Return the quantized matrix, once every column is done; `coded` has the half of it."""

    def code_column(self, column: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Reserve entries of a column and code the others, see ColumnQuantizer."""
        chosen = np.empty(self.rows, dtype=bool)
        if self._places is not None:
            chosen[:] = self._places[column].numpy()
        else:
            count = int(self._plan.reserved_counts[column])
            choose_reserved(values, count, self._plan.select == "tails", chosen)
        rows = np.flatnonzero(chosen)
        codes, quantized = self.quantize(column, values, rows)
        with np.errstate(over="ignore"):  # `reserved` refuses an infinite one
            kept = values[rows].astype(np.float16)
        self._kept[column] = rows, kept
        self._codes[column] = np.where(chosen, 0, codes)
        quantized = quantized.astype(np.float32)
        quantized[rows] = kept
        return quantized

    def reserve(self, places: Tensor | None) -> None:
        """Reserve these entries, see ColumnQuantizer."""
        counts = self._planned.reserved_counts if places is None else places.sum(dim=1)
        self._plan, self._places = replace(self._planned, reserved_counts=counts), places

    def coded(self) -> tuple[Tensor, Tensor, Reserved]:
        """Return codes [out, in] uint8, their widths and the entries that stay in float16."""
        rows, kept = (np.concatenate(part) for part in zip(*self._kept, strict=True))
        counts = self._plan.reserved_counts
        reserved = reserved_entries(counts, torch.from_numpy(rows), torch.from_numpy(kept))
        return torch.from_numpy(self._codes).t(), self._plan.column_bits, reserved
