"""The uniform grid of round-to-nearest and GPTQ: a scale and zero point per row and group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.quantize.layout import HALF_MAX
from claq_exp.quantize.quantized import RowGrid

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

    def start(self, weight: Tensor, column_bits: Tensor) -> UniformColumns:
        """Begin a matrix: weight [out, in], column_bits [in] uint8, all equal."""
        group_size = min(self.group_size or weight.shape[1], weight.shape[1])
        top = 2 ** int(column_bits[0]) - 1
        scales, zeros = [], []
        for group in weight.split(group_size, dim=1):
            low = group.amin(dim=1).clamp(max=0)
            high = group.amax(dim=1).clamp(min=0)
            scale = ((high - low) / top).clamp(min=SMALLEST_SCALE).half()
            scales.append(scale)
            zeros.append((-low / scale.float()).round().clamp(0, top).to(torch.uint8))
        grid = RowGrid(torch.stack(scales, dim=1), torch.stack(zeros, dim=1), group_size)
        return UniformColumns(weight.shape[1], top, grid)


class UniformColumns:
    """The codes found so far on a fixed grid."""

    def __init__(self, columns: int, top: int, grid: RowGrid) -> None:
        self.codes = np.zeros((columns, grid.scales.shape[0]), dtype=np.uint8)
        self._grid = grid
        self._top = top
        self._scales = np.ascontiguousarray(grid.scales.float().numpy().T)
        self._zeros = np.ascontiguousarray(grid.zeros.float().numpy().T)

    def quantize(
        self, column: int, values: NDArray[np.float32], reserved: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Round one column to the grid: [out] float32 -> [out] float32."""
        group = column // self._grid.group_size
        scale, zero = self._scales[group], self._zeros[group]
        codes = np.clip(np.rint(values / scale) + zero, 0, self._top)
        self.codes[column] = codes
        return np.clip(scale * (codes - zero), -HALF_MAX, HALF_MAX)

    def levels(self) -> RowGrid:
        """Return the grid."""
        return self._grid
