"""The uniform grid of round-to-nearest and GPTQ: a scale and zero point per row and group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError, check_choice
from claq_exp.payload.row_grid import RealGrid, RealGridLayout, RowGrid, RowGridLayout
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook
from claq_exp.quantize.codebook.columns import FixedColumns
from claq_exp.quantize.codebook.compiled import (
    GridTask,
    RealGridTask,
    code_on_grid,
    code_on_real_grid,
)
from claq_exp.quantize.codebook.grid_fit import fit_grids
from claq_exp.quantize.statistics import ColumnStatistics

WHOLE, REAL = "whole", "real"
MINMAX, SEARCH = "minmax", "search"
SMALLEST_SCALE = float(torch.finfo(torch.float16).tiny)


@dataclass(frozen=True)
class Uniform(Codebook):
    """Asymmetric grid with float16 scales, fixed before compensation ("static groups").

    w = s * (q - z).  Static groups cost no column index under act-order.  Source: GPTQ (arXiv
    2210.17323).

    group_size: neighbouring columns that share a grid; 0 for the whole row.
    zero_point: whole, a code: q = clamp(round(w / s) + z); or real, a float16: q = clamp(round(w /
        s + z)), with the z that is best for s (NeUQI, arXiv 2505.17595).
    clip: minmax, the grid spans the weights and 0; or search, the scale of least squared error,
        every column weighted by what an error in it costs (the solver's distortion weight).
    """

    mixed_widths: ClassVar[bool] = False
    reserves: ClassVar[bool] = False
    holds_levels: ClassVar[bool] = True

    group_size: int = 0
    zero_point: str = WHOLE
    clip: str = MINMAX

    def __post_init__(self) -> None:
        check_choice("codebook.zero_point", self.zero_point, (WHOLE, REAL))
        check_choice("codebook.clip", self.clip, (MINMAX, SEARCH))
        if self.group_size < 0:
            raise ConfigError(
                f"codebook.group_size is {self.group_size}; give 0 for whole rows or a positive "
                "number"
            )

    def layout(self, rows: int, plan: ColumnPlan) -> RowGridLayout | RealGridLayout:
        """Return how a matrix of so many rows is stored with a plan."""
        columns = len(plan.column_bits)
        kind = RealGridLayout if self.zero_point == REAL else RowGridLayout
        return kind.of(
            *(rows, plan.column_bits, plan.reserved_counts),
            group_size=min(self.group_size or columns, columns),
        )

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> UniformColumns:
        """Begin a matrix; all columns have one width."""
        weight = statistics.weight
        group_size = self.layout(len(weight), plan).group_size
        top = 2 ** int(plan.column_bits[0]) - 1
        found = []
        for group in weight.split(group_size, dim=1):
            low = group.amin(dim=1).clamp(max=0)
            high = group.amax(dim=1).clamp(min=0)
            scale = ((high - low) / top).clamp(min=SMALLEST_SCALE).half()
            found.append((scale, (-low / scale.float()).round().clamp(0, top)))
        scales, zeros = (torch.stack(part, dim=1) for part in zip(*found, strict=True))
        real, search = self.zero_point == REAL, self.clip == SEARCH
        if real or search:
            scales = scales.float()
            fit_grids(
                np.ascontiguousarray(weight.numpy()),
                statistics.column_importance().numpy(),
                *(group_size, top, real, search, scales.numpy(), zeros.numpy()),
            )
            scales = scales.half()
        zeros = zeros.half() if real else zeros.to(torch.uint8)
        return UniformColumns(plan, top, scales, zeros, group_size)


class UniformColumns(FixedColumns):
    """The codes found so far on a fixed grid.

    scales: [out, groups] float16.  zeros: [out, groups] uint8, or float16 where they are numbers.
    """

    def __init__(
        self, plan: ColumnPlan, top: int, scales: Tensor, zeros: Tensor, group_size: int
    ) -> None:
        super().__init__(len(scales), plan)
        self._grid = scales, zeros, group_size
        kind: type[GridTask] | type[RealGridTask] = GridTask
        self._step = code_on_grid
        if zeros.is_floating_point():
            kind, self._step = RealGridTask, code_on_real_grid
        self._task = kind(
            codes=self._codes,
            scales=np.ascontiguousarray(scales.float().numpy().T),
            zeros=np.ascontiguousarray(zeros.float().numpy().T),
            group_size=group_size,
            top=np.float32(top),
        )

    def compiled(self) -> GridTask | RealGridTask:
        """Return the task of the compiled step."""
        return self._task

    def code_column(self, column: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Code a column, see ColumnQuantizer."""
        quantized = np.empty_like(values)
        self._step(values, column, self._task, quantized)
        return quantized

    def payload(self) -> RowGrid | RealGrid:
        """Return codes and grid."""
        kind = RealGrid if self._grid[1].is_floating_point() else RowGrid
        return kind(*self.coded(), *self._grid)
