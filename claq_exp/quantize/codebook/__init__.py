"""Which values the codes stand for."""

from __future__ import annotations

from claq_exp.quantize.codebook.base import Codebook as Codebook
from claq_exp.quantize.codebook.base import ColumnQuantizer as ColumnQuantizer
from claq_exp.quantize.codebook.block_formats import Bfp, LoBcq, MxFp4, NvFp4, Vsq
from claq_exp.quantize.codebook.group_table import GroupTableCodebook
from claq_exp.quantize.codebook.kmeans import KMeans, KMeansExact
from claq_exp.quantize.codebook.row_kmeans import RowKMeans
from claq_exp.quantize.codebook.simple import NormalFloat, Quantile, UniformColumn
from claq_exp.quantize.codebook.sklearn_kmeans import SklearnKMeans
from claq_exp.quantize.codebook.svid import Svid
from claq_exp.quantize.codebook.uniform import Uniform

CODEBOOK: dict[str, type] = {
    "bfp": Bfp,
    "group_table": GroupTableCodebook,
    "kmeans": KMeans,
    "kmeans_exact": KMeansExact,
    "lo_bcq": LoBcq,
    "mxfp4": MxFp4,
    "normal_float": NormalFloat,
    "nvfp4": NvFp4,
    "quantile": Quantile,
    "row_kmeans": RowKMeans,
    "sklearn_kmeans": SklearnKMeans,
    "svid": Svid,
    "uniform": Uniform,
    "uniform_column": UniformColumn,
    "vsq": Vsq,
}
