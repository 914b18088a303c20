"""Which values the codes stand for."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from claq_exp.payload.base import Layout, Payload
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.block_formats import Bfp, LoBcq, MxFp4, NvFp4, Vsq
from claq_exp.quantize.codebook.kmeans import KMeans, KMeansExact
from claq_exp.quantize.codebook.simple import NormalFloat, Quantile, UniformColumn
from claq_exp.quantize.codebook.sklearn_kmeans import SklearnKMeans
from claq_exp.quantize.codebook.svid import Svid
from claq_exp.quantize.codebook.uniform import Uniform
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

    def payload(self) -> Payload:
        """Return the quantized matrix, once every column is done."""


class Codebook(Protocol):
    """A rule for the values of codes.

    mixed_widths: columns of one matrix may have different widths.
    reserves: works with reserved entries.

    A slow one also has `relative_cost`, its time for a column over that of kmeans, for estimates.
    """

    mixed_widths: ClassVar[bool]
    reserves: ClassVar[bool]

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> ColumnQuantizer:
        """Begin a matrix; statistics.weight is before compensation."""


@runtime_checkable
class OneWidth(Protocol):
    """A codebook that has codes of some widths alone."""

    def check(self, bits: int) -> None:
        """Raise ConfigError where there are no codes of so many bits."""


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
    "svid": Svid,
    "uniform": Uniform,
    "uniform_column": UniformColumn,
    "vsq": Vsq,
}
