"""Codebooks found by one-dimensional k-means, one per input column or shared and stretched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from claq_exp.payload.base import Layout
from claq_exp.payload.column_codebooks import ColumnCodebooksLayout
from claq_exp.payload.shared_codebooks import SharedCodebooksLayout
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook, DeviceRule
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.codebook.columns import CompiledColumns
from claq_exp.quantize.codebook.compiled import EXACT, FITTED, KMEANS
from claq_exp.quantize.statistics import ColumnStatistics

SAMPLE = 64  # columns that a shared codebook is learned from


@dataclass(frozen=True)
class KMeans(Codebook):
    """Fit 2**bits float16 centroids to the compensated column, without its reserved entries.

    The layer loss that a column causes under GPTQ is proportional to its squared error, so
    unweighted k-means of the compensated column minimises it.  Source: CLAQ (arXiv 2405.17233).

    fit_reserved: let reserved entries take part in the fit, as the reference code does.
    shared: one codebook per matrix and width, with a scale and shift per column (32 bits) in place
        of a codebook per column (16 * 2**bits): cheaper for few rows.
    row_scales: divide rows by their root mean square first, and weight them with its square (16
        bits a row).
    """

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True
    rule: ClassVar[int] = KMEANS

    fit_reserved: bool = False
    shared: bool = False
    row_scales: bool = False

    @property
    def free_levels(self) -> bool:
        """Whether a solver may choose the levels: not those of a codebook that columns share."""
        return not self.shared

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""
        form = SharedCodebooksLayout if self.shared else ColumnCodebooksLayout
        return form.of(rows, plan.column_bits, plan.reserved_counts, row_scaled=self.row_scales)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> CompiledColumns:
        """Begin a matrix."""
        scales = root_mean_squares(statistics.weight) if self.row_scales else None
        return CompiledColumns(
            statistics,
            plan,
            FITTED if self.shared else self.rule,
            books=shared_codebooks(statistics, plan.column_bits, scales) if self.shared else None,
            row_scales=scales,
            fit_reserved=self.fit_reserved,
        )

    def device_rule(self) -> DeviceRule | None:
        """Return the kernel's rule, for codebooks of columns that leave reserved entries out."""
        if self.rule != KMEANS or self.shared or self.fit_reserved:
            return None
        return DeviceRule(self.row_scales)


@dataclass(frozen=True)
class KMeansExact(KMeans):
    """k-means with the least squared error there is, by dynamic programming: slow, for comparison.

    Its fields are those of KMeans; shared codebooks are not found exactly.
    """

    rule: ClassVar[int] = EXACT


def root_mean_squares(weight: Tensor) -> Tensor:
    """Return the scale of each row, 1 for rows of zeros: [out, in] float32 -> [out] float16."""
    scales = weight.square().mean(dim=1).sqrt()
    tiny = torch.finfo(torch.float16).tiny
    return torch.where(scales > tiny, scales, torch.ones_like(scales)).half()


def shared_codebooks(
    statistics: ColumnStatistics, widths: Tensor, row_scales: Tensor | None
) -> dict[int, Tensor]:
    """Learn a codebook per width from columns spread over the matrix: width -> [2**width] float32.

    widths: uint8, in any shape.  The columns are brought to mean 0 and deviation 1, and weigh what
    an error in them costs.
    """
    columns = torch.linspace(0, statistics.shape[1] - 1, SAMPLE).round().long().unique()
    sample = statistics.weight[:, columns]
    importance = statistics.importance()
    if row_scales is not None:
        sample = sample / row_scales.float()[:, None]
        importance = importance * row_scales.float().square()
    deviation = sample.std(dim=0, correction=0)
    cost = statistics.distortion_weight[columns] * deviation.square()
    if not cost.sum() > 0:
        cost = torch.ones_like(cost)
    sample = (sample - sample.mean(dim=0)) / deviation.clamp(min=1e-12)
    weights = importance[:, None] * (cost / cost.mean())
    values = sample.t().reshape(-1).contiguous().numpy()
    books = {}
    for width in widths.unique().tolist():
        centroids = np.empty(2**width)
        fit_levels(values, weights.t().reshape(-1).contiguous().numpy(), centroids)
        books[width] = torch.from_numpy(centroids).float()
    return books
