"""Codebooks that are given by a formula, for comparison with those that are learned."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from claq_exp.payload.base import Layout
from claq_exp.payload.column_codebooks import ColumnCodebooksLayout
from claq_exp.payload.shared_codebooks import SharedCodebooksLayout
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook
from claq_exp.quantize.codebook.columns import CompiledColumns
from claq_exp.quantize.codebook.compiled import ABSMAX, QUANTILES, RANGE
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Quantile(Codebook):
    """Give each level of a column the same number of entries, and put it at their mean."""

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True
    holds_levels: ClassVar[bool] = True

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""
        return ColumnCodebooksLayout.of(rows, plan.column_bits, plan.reserved_counts)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> CompiledColumns:
        """Begin a matrix."""
        return CompiledColumns(statistics, plan, QUANTILES)


@dataclass(frozen=True)
class UniformColumn(Codebook):
    """Space the levels of a column evenly from its smallest to its largest entry.

    Stored as a scale and a shift per column.
    """

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True
    holds_levels: ClassVar[bool] = True

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""
        return SharedCodebooksLayout.of(rows, plan.column_bits, plan.reserved_counts)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> CompiledColumns:
        """Begin a matrix."""
        widths = plan.column_bits.unique().tolist()
        books = {width: torch.arange(2**width, dtype=torch.float32) for width in widths}
        return CompiledColumns(statistics, plan, RANGE, books=books)


@dataclass(frozen=True)
class NormalFloat(Codebook):
    """Place the levels at quantiles of a normal distribution, scaled to the column's largest entry.

    Stored as a scale and a (zero) shift per column.  Source: QLoRA (arXiv 2305.14314), section 3.
    """

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True
    holds_levels: ClassVar[bool] = True

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""
        return SharedCodebooksLayout.of(rows, plan.column_bits, plan.reserved_counts)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> CompiledColumns:
        """Begin a matrix."""
        books = {width: normal_float(width) for width in plan.column_bits.unique().tolist()}
        return CompiledColumns(statistics, plan, ABSMAX, books=books)


def normal_float(width: int) -> Tensor:
    """Return the levels of NormalFloat, ascending from -1 to 1: [2**width] float32.

    Half of the levels and one more from 0 to 1, half of them from -1 to 0, with 0 in common; one
    bit has the levels -1 and 1.  NF4 is `normal_float(4)`.
    """
    if width == 1:
        return torch.tensor([-1.0, 1.0])
    half = 2 ** (width - 1)
    # the outermost quantile, midway between those of 2**width and 2**width - 1 levels
    outer = 1 - 0.5 * (1 / (4 * half) + 1 / (2 * (2 * half - 1)))
    above = [_quantile(outer, step / half) for step in range(half)]
    below = [-_quantile(outer, step / (half - 1)) for step in range(half - 1)]
    levels = torch.tensor([*below, 0.0, *reversed(above)], dtype=torch.float64)
    return (levels / levels.abs().max()).float()


def _quantile(outer: float, share: float) -> float:
    return NormalDist().inv_cdf(outer + (0.5 - outer) * share)
