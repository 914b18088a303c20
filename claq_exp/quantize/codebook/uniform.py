"""The uniform grid of round-to-nearest and GPTQ: a scale and zero point per row and group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from claq_exp.errors import ConfigError
from claq_exp.payload.operand import RowScales
from claq_exp.payload.row_grid import RowGrid, RowGridLayout
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook
from claq_exp.quantize.codebook.columns import FixedColumns
from claq_exp.quantize.codebook.compiled import GridTask, code_on_grid
from claq_exp.quantize.statistics import ColumnStatistics

SMALLEST_SCALE = float(torch.finfo(torch.float16).tiny)


@dataclass(frozen=True)
class Uniform(Codebook):
    """Asymmetric min-max grid with float16 scales, fixed before compensation ("static groups").

    q = clamp(round(w / s) + z), w = s * (q - z).  Static groups cost no column index under
    act-order.  Source: GPTQ (arXiv 2210.17323).

    group_size: neighbouring columns that share a grid; 0 for the whole row.
    """

    mixed_widths: ClassVar[bool] = False
    reserves: ClassVar[bool] = False

    group_size: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 0:
            raise ConfigError(
                f"codebook.group_size is {self.group_size}; give 0 for whole rows or a positive "
                "number"
            )

    def layout(self, rows: int, plan: ColumnPlan) -> RowGridLayout:
        """Return how a matrix of so many rows is stored with a plan."""
        columns = len(plan.column_bits)
        return RowGridLayout.of(
            *(rows, plan.column_bits, plan.reserved_counts),
            group_size=min(self.group_size or columns, columns),
        )

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> UniformColumns:
        """Begin a matrix; all columns have one width."""
        weight = statistics.weight
        group_size = self.layout(len(weight), plan).group_size
        top = 2 ** int(plan.column_bits[0]) - 1
        scales, zeros = [], []
        for group in weight.split(group_size, dim=1):
            low = group.amin(dim=1).clamp(max=0)
            high = group.amax(dim=1).clamp(min=0)
            scale = ((high - low) / top).clamp(min=SMALLEST_SCALE).half()
            scales.append(scale)
            zeros.append((-low / scale.float()).round().clamp(0, top).to(torch.uint8))
        grid = RowScales(torch.stack(scales, dim=1), torch.stack(zeros, dim=1), group_size)
        return UniformColumns(plan, top, grid)


class UniformColumns(FixedColumns):
    """The codes found so far on a fixed grid."""

    def __init__(self, plan: ColumnPlan, top: int, grid: RowScales) -> None:
        super().__init__(grid.scales.shape[0], plan)
        self._grid = grid
        self._task = GridTask(
            codes=self._codes,
            scales=np.ascontiguousarray(grid.scales.float().numpy().T),
            zeros=np.ascontiguousarray(grid.zeros.float().numpy().T),
            group_size=grid.group_size,
            top=np.float32(top),
        )

    def compiled(self) -> GridTask:
        """Return the task of the compiled step."""
        return self._task

    def code_column(self, column: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Code a column, see ColumnQuantizer."""
        quantized = np.empty_like(values)
        code_on_grid(values, column, self._task, quantized)
        return quantized

    def payload(self) -> RowGrid:
        """Return codes and grid."""
        grid = self._grid
        return RowGrid(*self.coded(), grid.scales, grid.zeros, grid.group_size)
