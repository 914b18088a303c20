"""Which values the codes stand for."""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.quantize.codebook.kmeans import KMeans
from claq_exp.quantize.codebook.sklearn_kmeans import SklearnKMeans
from claq_exp.quantize.codebook.uniform import Uniform
from claq_exp.quantize.quantized import ColumnCodebooks, RowGrid


class ColumnQuantizer(Protocol):
    """The state of one matrix while its columns are quantized, each once, in any order."""

    codes: NDArray[np.uint8]
    """[in, out], filled column by column."""

    def quantize(
        self, column: int, values: NDArray[np.float32], reserved: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Code one compensated column and return the values of its codes: [out] -> [out].

        `reserved` lists rows that are stored in float16 whatever is returned for them.
        """

    def levels(self) -> ColumnCodebooks | RowGrid:
        """Return what the codes stand for, once every column is done."""


class Codebook(Protocol):
    """A rule for the values of codes.

    mixed_widths: columns of one matrix may have different widths.
    reserves: works with reserved entries.

    A slow one also has `relative_cost`, its time for a column over that of kmeans, for estimates.
    """

    mixed_widths: ClassVar[bool]
    reserves: ClassVar[bool]

    def start(self, weight: Tensor, column_bits: Tensor) -> ColumnQuantizer:
        """Begin a matrix: weight [out, in] float32 before compensation, column_bits [in] uint8."""


CODEBOOK: dict[str, type] = {
    "kmeans": KMeans,
    "sklearn_kmeans": SklearnKMeans,
    "uniform": Uniform,
}
