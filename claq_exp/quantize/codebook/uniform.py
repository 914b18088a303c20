"""The uniform grid of round-to-nearest and GPTQ: a scale and zero point per row and group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from claq_exp.errors import ConfigError
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.block import quantize_block_on_grid
from claq_exp.quantize.codebook.columns import FixedColumns
from claq_exp.quantize.layout import ROW_GRID, Form
from claq_exp.quantize.quantized import RowGrid
from claq_exp.quantize.statistics import ColumnStatistics

SMALLEST_SCALE = float(torch.finfo(torch.float16).tiny)


@dataclass(frozen=True)
class Uniform:
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

    def form(self, columns: int) -> Form:
        """Return how the grids of a matrix are stored."""
        return Form(ROW_GRID, min(self.group_size or columns, columns))

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> UniformColumns:
        """Begin a matrix; all columns have one width."""
        weight = statistics.weight
        group_size = self.form(weight.shape[1]).group_size
        top = 2 ** int(plan.column_bits[0]) - 1
        scales, zeros = [], []
        for group in weight.split(group_size, dim=1):
            low = group.amin(dim=1).clamp(max=0)
            high = group.amax(dim=1).clamp(min=0)
            scale = ((high - low) / top).clamp(min=SMALLEST_SCALE).half()
            scales.append(scale)
            zeros.append((-low / scale.float()).round().clamp(0, top).to(torch.uint8))
        grid = RowGrid(torch.stack(scales, dim=1), torch.stack(zeros, dim=1), group_size)
        return UniformColumns(weight.shape[1], top, grid)


class UniformColumns(FixedColumns):
    """The codes found so far on a fixed grid."""

    def __init__(self, columns: int, top: int, grid: RowGrid) -> None:
        super().__init__(grid.scales.shape[0], columns)
        self._grid = grid
        self._scales = np.ascontiguousarray(grid.scales.float().numpy().T)
        zeros = grid.zeros.float().numpy().T
        self._zeros = np.ascontiguousarray(zeros)
        self._top = np.float32(top)

    def quantize_block(
        self,
        columns: NDArray[np.int64],
        values: NDArray[np.float32],
        lower: NDArray[np.float32],
    ) -> None:
        """Quantize some columns, see `claq_exp.quantize.codebook.block.quantize_block`."""
        groups = columns // self._grid.group_size
        task = (columns, groups, self._scales, self._zeros, self._top)
        quantize_block_on_grid(values, lower, task, self._codes)

    def levels(self) -> RowGrid:
        """Return the grid."""
        return self._grid
