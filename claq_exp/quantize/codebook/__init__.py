"""Which values the codes stand for."""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.block_formats import Bfp, LoBcq, MxFp4, NvFp4, Vsq
from claq_exp.quantize.codebook.kmeans import KMeans, KMeansExact
from claq_exp.quantize.codebook.simple import NormalFloat, Quantile, UniformColumn
from claq_exp.quantize.codebook.sklearn_kmeans import SklearnKMeans
from claq_exp.quantize.codebook.uniform import Uniform
from claq_exp.quantize.layout import Form
from claq_exp.quantize.quantized import Levels, Reserved
from claq_exp.quantize.statistics import ColumnStatistics


class ColumnQuantizer(Protocol):
    """The state of one matrix while its columns are quantized, each once, in any order.

    One that fits by passes also has `unconverged`, how many columns used up the allowed ones.
    """

    def quantize_block(
        self,
        columns: NDArray[np.int64],
        values: NDArray[np.float32],
        lower: NDArray[np.float32],
    ) -> None:
        """Quantize some columns, see `claq_exp.quantize.codebook.block.quantize_block`."""

    def codes(self) -> Tensor:
        """Return the codes once every column is done: [out, in] uint8."""

    def levels(self) -> Levels:
        """Return what the codes stand for, once every column is done."""

    def reserved(self) -> Reserved:
        """Return the entries that stay in float16, once every column is done."""


class Codebook(Protocol):
    """A rule for the values of codes.

    mixed_widths: columns of one matrix may have different widths.
    reserves: works with reserved entries.

    A slow one also has `relative_cost`, its time for a column over that of kmeans, for estimates.
    """

    mixed_widths: ClassVar[bool]
    reserves: ClassVar[bool]

    def form(self, columns: int) -> Form:
        """Return how the values of a matrix with so many columns are stored."""

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> ColumnQuantizer:
        """Begin a matrix; statistics.weight is before compensation."""


CODEBOOK: dict[str, type] = {
    "bfp": Bfp,
    "kmeans": KMeans,
    "kmeans_exact": KMeansExact,
    "lo_bcq": LoBcq,
    "mxfp4": MxFp4,
    "normal_float": NormalFloat,
    "nvfp4": NvFp4,
    "quantile": Quantile,
    "sklearn_kmeans": SklearnKMeans,
    "uniform": Uniform,
    "uniform_column": UniformColumn,
    "vsq": Vsq,
}
