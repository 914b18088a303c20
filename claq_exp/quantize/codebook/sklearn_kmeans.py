"""The codebooks of CLAQ's reference code: scikit-learn's k-means, one call per column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from claq_exp.errors import ConfigError
from claq_exp.payload.base import Layout
from claq_exp.payload.column_codebooks import ColumnCodebooks, ColumnCodebooksLayout
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook
from claq_exp.quantize.codebook.basics import assign_codes
from claq_exp.quantize.codebook.columns import PythonColumns
from claq_exp.quantize.statistics import ColumnStatistics

PASSES = 300  # at most


@dataclass(frozen=True)
class SklearnKMeans(Codebook):
    """Fit 2**bits float16 centroids to the compensated column as scikit-learn's KMeans finds them.

    One k-means++ start, at most 300 passes, tolerance 1e-4.  Slower and further from the optimum
    than codebook=kmeans; for comparison with the reference code of CLAQ (arXiv 2405.17233), which
    differs in keeping the centroids in float32.

    seed: of the start (reference code: 10).
    fit_reserved: fit to the entries that stay in 16 bits as well, as the reference code does.
    """

    mixed_widths: ClassVar[bool] = True
    reserves: ClassVar[bool] = True
    holds_levels: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 12.0

    seed: int = 10
    fit_reserved: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(
                f"codebook.seed is {self.seed}; give a whole number from 0 to {2**32 - 1}"
            )

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""
        return ColumnCodebooksLayout.of(rows, plan.column_bits, plan.reserved_counts)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> SklearnColumns:
        """Begin a matrix."""
        return SklearnColumns(self, statistics, plan)


class SklearnColumns(PythonColumns):
    """The codebooks and codes found so far.

    unconverged: columns whose fit used up its passes; what it had found by then is kept.
    """

    def __init__(self, rule: SklearnKMeans, statistics: ColumnStatistics, plan: ColumnPlan) -> None:
        super().__init__(statistics, plan)
        self._rule = rule
        self._entries = [1 << bits for bits in plan.column_bits.tolist()]
        shape = (len(self._entries), max(self._entries))
        self._centroids = np.zeros(shape, dtype=np.float16)
        self._threads: ThreadpoolController | None = None
        self._held = False
        self.unconverged = 0

    def hold(self, held: bool = True) -> None:
        """Keep the centroids, see ColumnQuantizer."""
        self._held = held

    def quantize(
        self, column: int, values: NDArray[np.float32], reserved: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Fit the column's codebook and code the column; see PythonColumns."""
        entries = self._entries[column]
        if not self._held:
            fitted = values if self._rule.fit_reserved else np.delete(values, reserved)
            with np.errstate(over="ignore"):  # an infinite level is refused with the whole matrix
                found = self._fit(fitted, entries).astype(np.float16)
            self._centroids[column, :entries] = np.pad(
                found, (0, entries - len(found)), mode="edge"
            )
        levels = self._centroids[column, :entries].astype(np.float32)
        codes = np.empty(self.rows, dtype=np.uint8)
        assign_codes(values, levels, codes)
        return codes, levels[codes]

    def payload(self) -> ColumnCodebooks:
        """Return codes and the codebooks of all columns."""
        return ColumnCodebooks(*self.coded(), torch.from_numpy(self._centroids))

    def _fit(self, values: NDArray[np.float32], entries: int) -> NDArray[np.float32]:
        """Return at least one and at most `entries` ascending centroids."""
        distinct = np.unique(values)
        if len(distinct) <= entries:
            return distinct if len(distinct) else np.zeros(1, dtype=np.float32)
        from sklearn.cluster import KMeans  # slow to import

        if self._threads is None:  # made once scikit-learn has loaded its libraries
            self._threads = ThreadpoolController()
        means = KMeans(
            n_clusters=entries,
            init="k-means++",
            n_init=1,
            max_iter=PASSES,
            tol=1e-4,
            random_state=self._rule.seed,
        )
        with self._threads.limit(limits=1, user_api="openmp"):  # sums in one order
            means.fit(values.reshape(-1, 1))
        self.unconverged += means.n_iter_ == PASSES
        return np.sort(means.cluster_centers_.reshape(-1))
