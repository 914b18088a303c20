"""Codebooks found by one-dimensional k-means, one per input column or shared and stretched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError, check_choice
from claq_exp.number_formats.level_sets import LEVEL_SETS, check_level_set, level_set
from claq_exp.payload.base import Layout
from claq_exp.payload.column_codebooks import ColumnCodebooksLayout
from claq_exp.payload.shared_codebooks import SharedCodebooksLayout
from claq_exp.payload.snapped_codebooks import SnappedCodebooksLayout
from claq_exp.payload.stored import HALF, MAX_BITS, packed_bytes
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook, DeviceRule
from claq_exp.quantize.codebook.clustering import fit_levels
from claq_exp.quantize.codebook.columns import CompiledColumns
from claq_exp.quantize.codebook.compiled import EXACT, FITTED, KMEANS
from claq_exp.quantize.statistics import ColumnStatistics

FREE = "none"  # the level set of which every float16 is a member
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
    snap: none, each level is a float16; apot or grid, it is one of a set of levels
        (`claq_exp.number_formats.level_sets`) times a scale of its column, and an index of
        snap_bits is stored in its place.  For codebooks of columns.
    snap_bits: 6 to 8; a codebook of so many levels must be smaller than the set.
    """

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True
    holds_levels: ClassVar[bool] = True
    rule: ClassVar[int] = KMEANS

    fit_reserved: bool = False
    shared: bool = False
    row_scales: bool = False
    snap: str = FREE
    snap_bits: int = 7

    def __post_init__(self) -> None:
        check_choice("codebook.snap", self.snap, (FREE, *LEVEL_SETS))
        if self.snap == FREE:
            return
        check_level_set(self.snap, self.snap_bits)
        if self.shared:
            raise ConfigError(
                "codebook.snap is about codebooks of columns: leave codebook.shared=false"
            )

    def check(self, bits: int) -> None:
        """Raise ConfigError where a codebook would take most of its level set."""
        if bits > self.widest:
            raise ConfigError(
                f"{2**bits} levels of a column do not stand in a set of 2**{self.snap_bits}: "
                "leave codebook.snap=none, or give fewer bits"
            )

    @property
    def widest(self) -> int:
        """The bits of the longest codes that there can be."""
        return MAX_BITS if self.snap == FREE else self.snap_bits - 1

    def variant(self, *, shared: bool, row_scales: bool) -> KMeans:
        """Return the same with shared codebooks, which are not snapped, or with its own."""
        snap = FREE if shared else self.snap
        return replace(self, shared=shared, row_scales=row_scales, snap=snap)

    def level_set(self) -> Tensor:
        """Return what levels over their column's scale may be: [any] float32, empty for all."""
        return torch.zeros(0) if self.snap == FREE else level_set(self.snap, self.snap_bits)

    def column_bits(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bits of a column beside its codes, by its width: [any] each."""
        if self.shared:
            return np.full_like(widths, 2 * HALF)
        if self.snap == FREE:
            return HALF * 2**widths
        packed = [8 * packed_bytes(2 ** int(width), self.snap_bits) for width in widths]
        return HALF + np.array(packed, dtype=np.int64)

    def fixed_bits(self, rows: int, _columns: int) -> int:
        """Return about what a matrix stores beside its columns."""
        books = HALF * sum(2**width for width in range(2, 5)) if self.shared else 0
        return HALF * rows * self.row_scales + books

    @property
    def free_levels(self) -> bool:
        """Whether a solver may choose the levels: not where columns share a codebook or a set."""
        return not self.shared and self.snap == FREE

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""
        coded = rows, plan.column_bits, plan.reserved_counts
        if self.snap != FREE:
            return SnappedCodebooksLayout.of(
                *coded,
                row_scaled=self.row_scales,
                level_set=self.snap,
                level_bits=self.snap_bits,
            )
        form = SharedCodebooksLayout if self.shared else ColumnCodebooksLayout
        return form.of(*coded, row_scaled=self.row_scales)

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
            snap=None if self.snap == FREE else (self.snap, self.snap_bits),
        )

    def device_rule(self) -> DeviceRule | None:
        """Return the kernel's rule, for codebooks of columns that leave reserved entries out."""
        if self.rule != KMEANS or self.shared or self.fit_reserved or self.snap != FREE:
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
