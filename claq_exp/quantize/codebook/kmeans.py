"""A codebook of its own for every input column, found by one-dimensional k-means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.quantize.codebook.clustering import assign_codes, fit_levels
from claq_exp.quantize.quantized import ColumnCodebooks


@dataclass(frozen=True)
class KMeans:
    """Fit 2**bits float16 centroids to the compensated column, without its reserved entries.

    The layer loss that a column causes under GPTQ is proportional to its squared error, so
    unweighted k-means of the compensated column minimises it.  Source: CLAQ (arXiv 2405.17233).
    """

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True

    def start(self, weight: Tensor, column_bits: Tensor) -> KMeansColumns:
        """Begin a matrix: weight [out, in], column_bits [in] uint8."""
        return KMeansColumns(weight.shape[0], column_bits.numpy())


class KMeansColumns:
    """The codebooks and codes found so far."""

    def __init__(self, rows: int, column_bits: NDArray[np.uint8]) -> None:
        columns = len(column_bits)
        self.codes = np.zeros((columns, rows), dtype=np.uint8)
        self._entries = [1 << int(bits) for bits in column_bits]
        self._centroids = np.zeros((columns, max(self._entries)), dtype=np.float16)
        self._fitted = np.ones(rows, dtype=bool)

    def quantize(
        self, column: int, values: NDArray[np.float32], reserved: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Fit the column's codebook and code the column: [out] float32 -> [out] float32."""
        entries = self._entries[column]
        self._fitted[reserved] = False
        fitted = np.sort(values[self._fitted])
        self._fitted[reserved] = True
        with np.errstate(over="ignore"):  # an infinite level is refused with the whole matrix
            centroids = fit_levels(fitted, entries).astype(np.float16)
        self._centroids[column, :entries] = centroids
        levels = centroids.astype(np.float32)
        codes = self.codes[column]
        assign_codes(values, levels, codes)
        codes[reserved] = 0
        return levels[codes]

    def levels(self) -> ColumnCodebooks:
        """Return the codebooks of all columns."""
        return ColumnCodebooks(torch.from_numpy(self._centroids))
