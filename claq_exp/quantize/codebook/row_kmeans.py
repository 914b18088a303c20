"""Codebooks of output rows: weighted k-means of each row, fitted before compensation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError, check_choice
from claq_exp.payload.row_codebooks import RowCodebooks, RowCodebooksLayout
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook, ColumnQuantizer, Tables
from claq_exp.quantize.codebook.basics import choose_reserved
from claq_exp.quantize.codebook.columns import (
    ascending,
    clear_reserved,
    free_entries,
    placed,
    reserved_entries,
)
from claq_exp.quantize.codebook.compiled import EXACT, KMEANS
from claq_exp.quantize.codebook.compiled_rows import RowTask, code_by_row, fit_rows
from claq_exp.quantize.statistics import ColumnStatistics

INVERSE, DIAGONAL = "inverse", "diagonal"
PRICES = (INVERSE, DIAGONAL)
MOST_POWER = 8.0


@dataclass(frozen=True)
class RowKMeans(Codebook):
    """Fit 2**bits float16 centroids to each row of the weight, before any compensation.

    A level serves all columns of its row, and these are worth differently: column j weighs
    price_j^(power / 2) in the fit.  The column loop then codes against fixed levels.  Costs 16 *
    2**bits / in bits a weight.

    price: inverse, 1 / U_jj^2 with U the Cholesky factor of the inverse Hessian, in the order of
        columns (LeanQuant's U_jj^-power); diagonal, H_jj (power 2: SqueezeLLM's weighting by the
        diagonal of the Hessian).  Without compensation both are H_jj.
    power: 0 for all columns alike.
    exact: the least weighted squared error there is, by dynamic programming; else a fit of nearly
        that.
    fit_reserved: let reserved entries take part in the fit.

    Source: SqueezeLLM (arXiv 2306.07629), section 4.1; LeanQuant (arXiv 2407.10032), section 3,
    which starts k-means from a grid at 3 bits and below.
    """

    mixed_widths: ClassVar[bool] = False
    reserves: ClassVar[bool] = True
    holds_levels: ClassVar[bool] = True

    price: str = INVERSE
    power: float = 3.0
    exact: bool = False
    fit_reserved: bool = False

    def __post_init__(self) -> None:
        check_choice("codebook.price", self.price, PRICES)
        if not 0 <= self.power <= MOST_POWER:
            raise ConfigError(
                f"codebook.power is {self.power}; give a number from 0 to {MOST_POWER:g}"
            )

    @property
    def free_levels(self) -> bool:
        """Whether a solver may choose the levels: it may."""
        return True

    def layout(self, rows: int, plan: ColumnPlan) -> RowCodebooksLayout:
        """Return how a matrix of so many rows is stored with a plan."""
        return RowCodebooksLayout.of(rows, plan.column_bits, plan.reserved_counts)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> RowColumns:
        """Begin a matrix; all columns have one width."""
        price = statistics.diagonal if self.price == DIAGONAL else statistics.distortion_weight
        if price is None:
            raise ConfigError(
                "codebook.price=diagonal needs a solver that tells the Hessian's diagonal; choose "
                "codebook.price=inverse"
            )
        chosen = np.zeros(statistics.shape, dtype=np.bool_)
        if not self.fit_reserved:
            mark_reserved(statistics.weight, plan, chosen)
        levels = np.empty((statistics.shape[0], 2 ** int(plan.column_bits[0])), dtype=np.float32)
        weights = column_weights(price, self.power).numpy()
        rule = EXACT if self.exact else KMEANS
        fit_rows(statistics.weight.contiguous().numpy(), weights, chosen, rule, levels)
        return RowColumns(plan, levels)


def column_weights(price: Tensor, power: float) -> Tensor:
    """Return price^(power / 2), the largest 1: [in] float32.

    What costs nothing weighs as the cheapest of the others; where nothing costs, all are alike.
    """
    paid = price > 0
    if not bool(paid.any()):
        return torch.ones(len(price))
    price = torch.where(paid, price, price[paid].min()).double()
    return (price / price.max()).pow(power / 2).float()


def mark_reserved(weight: Tensor, plan: ColumnPlan, chosen: NDArray[np.bool_]) -> None:
    """Mark the entries that would be reserved before compensation: [out, in] bool, changed."""
    marks = np.empty(len(weight), dtype=np.bool_)
    for column in plan.reserved_counts.nonzero().flatten().tolist():
        values = weight[:, column].contiguous().numpy()
        choose_reserved(values, int(plan.reserved_counts[column]), plan.select == "tails", marks)
        chosen[:, column] = marks


class RowColumns(ColumnQuantizer):
    """The codes found so far on levels of rows, [out, 2**bits] float32 of float16 values."""

    def __init__(self, plan: ColumnPlan, levels: NDArray[np.float32]) -> None:
        self._plan = self._planned = plan
        columns = len(plan.column_bits)
        offsets = np.zeros(columns + 1, dtype=np.int64)
        np.cumsum(plan.reserved_counts.numpy(), out=offsets[1:])
        entries = np.ascontiguousarray(levels.T)
        self._task = RowTask(
            levels=entries,
            borders=borders_of(entries),
            offsets=offsets,
            tails=plan.select == "tails",
            placed=False,
            codes=np.zeros((columns, len(levels)), dtype=np.uint8),
            rows=np.zeros(offsets[-1], dtype=np.int64),
            kept=np.zeros(offsets[-1], dtype=np.float32),
        )

    def compiled(self) -> RowTask:
        """Return the task of the compiled step."""
        return self._task

    def code_column(self, column: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Code a column, see ColumnQuantizer."""
        quantized = np.empty_like(values)
        code_by_row(values, column, self._task, quantized)
        return quantized

    def payload(self) -> RowCodebooks:
        """Return codes, codebooks and the entries that stay in float16."""
        task, plan = self._task, self._plan
        kept = torch.from_numpy(task.kept).half()
        reserved = reserved_entries(plan.reserved_counts, torch.from_numpy(task.rows), kept)
        levels = torch.from_numpy(task.levels).t().half().contiguous()
        return RowCodebooks(torch.from_numpy(task.codes).t(), plan.column_bits, reserved, levels)

    def tables(self) -> Tables:
        """Return the levels of rows, see ColumnQuantizer."""
        task = self._task
        levels = torch.from_numpy(task.levels).t()
        return Tables(True, levels, torch.from_numpy(task.codes), free_entries(task))

    def settle(self, levels: Tensor) -> None:
        """Take other levels, see ColumnQuantizer."""
        task = self._task
        ranked, rank = ascending(levels.numpy())
        task.levels[:] = ranked.T
        task.borders[:] = borders_of(task.levels)
        task.codes[:] = np.take_along_axis(rank.T, task.codes, axis=0)
        self._task = task._replace(placed=True)
        clear_reserved(task)

    def hold(self, held: bool = True) -> None:
        """Do nothing: the levels of rows are fixed before, see ColumnQuantizer."""

    def reserve(self, places: Tensor | None) -> None:
        """Reserve these entries, see ColumnQuantizer."""
        self._plan, self._task = placed(places, self._planned, self._task)


def borders_of(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what lies midway between neighbouring levels: [entries - 1, out] float32."""
    borders: NDArray[np.float32] = np.float32(0.5) * (levels[1:] + levels[:-1])
    return borders
