"""What the allocation strategies may know of a matrix's columns before any column is quantized."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

COLUMNS = 128  # that are measured at a time
SALIENCY, VISITING = "saliency", "visiting"
TIES = (SALIENCY, VISITING)


@dataclass(frozen=True)
class ColumnStatistics:
    """A weight matrix and the price of an error in each of its columns.

    weight: [out, in] float32, before any compensation.
    distortion_weight: [in] float32, the layer loss per unit of squared error in the column:
        1 / U_jj^2 under GPTQ (U = upper Cholesky factor of the inverse Hessian), H_jj without
        compensation.
    order: [in] int64, the columns as the solver visits them (GPTQ: its act-order permutation).
    name: full name of the linear layer in its model, e.g. model.layers.0.self_attn.k_proj; empty
        when unknown.
    row_weights: [out] float32, importance of an error in each row; None for all alike.
    diagonal: [in] float32, H_jj; None where the solver does not say it.
    group_shares: [groups, in] float32, what an error in a column costs in each group of
        neighbouring rows, in equal numbers, over `distortion_weight`; None for all alike.
    """

    weight: Tensor
    distortion_weight: Tensor
    order: Tensor
    name: str = ""
    row_weights: Tensor | None = None
    diagonal: Tensor | None = None
    group_shares: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def importance(self) -> Tensor:
        """Return the importance of each row: [out] float32."""
        if self.row_weights is None:
            return torch.ones(self.weight.shape[0])
        return self.row_weights

    def column_importance(self) -> Tensor:
        """Return the distortion weights over their mean, ones where all are 0: [in] float32."""
        weight = self.distortion_weight.double()
        mean = weight.mean()
        return (weight / mean).float() if mean > 0 else torch.ones(len(weight))

    def sensitivity(self) -> Tensor:
        """Return the OBS saliency mean_i(W_ij^2) * distortion_weight_j: [in] float32."""
        if self.group_shares is None:
            return self._by_column(lambda part: part.square().mean(dim=0)) * self.distortion_weight
        groups = [
            replace(self, weight=own, group_shares=None).sensitivity() * share
            for own, share in zip(
                self.weight.chunk(len(self.group_shares)), self.group_shares, strict=True
            )
        ]
        return torch.stack(groups).mean(dim=0)

    def outlier_counts(self, threshold: float) -> Tensor:
        """Return how many entries reach `threshold` times the matrix mean of |W|: [in] int64."""
        sums = self._by_column(lambda part: part.abs().sum(dim=0, dtype=torch.float64))
        level = threshold * float(sums.sum()) / self.weight.numel()
        return self._by_column(lambda part: (part.abs() >= level).sum(dim=0))

    def outlier_order(self, threshold: float, ties: str = SALIENCY) -> Tensor:
        """Return the columns from most to least outliers (CLAQ's Outlier Order): [in] int64.

        At the paper's threshold of 13 most columns of a small model have no outlier at all, so that
        ties decide.  `saliency` breaks them by the saliency, then by the column's index; `visiting`
        puts the column first that is visited first, as a stable sort of the permuted matrix does.
        """
        counts = self.outlier_counts(threshold)
        if ties == VISITING:
            return self.order[torch.argsort(counts[self.order], descending=True, stable=True)]
        return torch.from_numpy(np.lexsort((-self.sensitivity().numpy(), -counts.numpy())))

    def saliency_order(self) -> Tensor:
        """Return the columns from largest to smallest OBS saliency, ties by index: [in] int64."""
        return torch.argsort(self.sensitivity(), descending=True, stable=True)

    def magnitudes(self) -> Tensor:
        """Return the mean |W| of each column: [in] float32."""
        return self._by_column(lambda part: part.abs().mean(dim=0))

    def magnitude_order(self) -> Tensor:
        """Return the columns from largest to smallest mean |W|, ties by index: [in] int64."""
        return torch.argsort(self.magnitudes(), descending=True, stable=True)

    def _by_column(self, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """Measure some columns at a time, without a second matrix; [in] of what `measure` gives."""
        return torch.cat([measure(part) for part in self.weight.split(COLUMNS, dim=1)])

    def random_order(self, seed: int) -> Tensor:
        """Return a permutation that follows from seed, name and shape alone: [in] int64."""
        rows, columns = self.shape
        digest = hashlib.sha256(f"{seed}/{self.name}/{rows}x{columns}".encode()).digest()
        # RandomState, for its stream is the same in every version of numpy
        generator = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
        return torch.from_numpy(generator.permutation(columns))


class EqualColumns(ColumnStatistics):
    """The statistics of a matrix of ones of any size, for plans before any weight is read."""

    def __init__(self, rows: int, columns: int, name: str = "") -> None:
        ones = torch.ones(1, 1).expand(rows, columns)
        super().__init__(ones, torch.ones(columns), torch.arange(columns), name)

    def sensitivity(self) -> Tensor:
        """Return ones: [in] float32."""
        return torch.ones(self.shape[1])

    def magnitudes(self) -> Tensor:
        """Return ones: [in] float32."""
        return torch.ones(self.shape[1])

    def outlier_counts(self, threshold: float) -> Tensor:
        """Return all entries or none: [in] int64."""
        rows, columns = self.shape
        return torch.full((columns,), rows if threshold <= 1 else 0)
