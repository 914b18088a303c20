"""What the allocation strategies may know of a matrix's columns before any column is quantized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnStatistics:
    """A weight matrix and the price of an error in each of its columns.

    weight: [out, in] float32, before any compensation.
    distortion_weight: [in] float32, the layer loss per unit of squared error in the column:
        1 / U_jj^2 under GPTQ (U = upper Cholesky factor of the inverse Hessian), H_jj without
        compensation.
    row_weights: [out] float32, importance of an error in each row; None for all alike.
    """

    weight: Tensor
    distortion_weight: Tensor
    row_weights: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def importance(self) -> Tensor:
        """Return the importance of each row: [out] float32."""
        if self.row_weights is None:
            return torch.ones(self.weight.shape[0])
        return self.row_weights

    def sensitivity(self) -> Tensor:
        """Return the OBS saliency mean_i(W_ij^2) * distortion_weight_j: [in] float32."""
        return self.weight.square().mean(dim=0) * self.distortion_weight

    def outlier_counts(self, threshold: float) -> Tensor:
        """Return how many entries reach `threshold` times the matrix mean of |W|: [in] int64."""
        magnitude = self.weight.abs()
        return (magnitude >= threshold * magnitude.mean()).sum(dim=0)

    def outlier_order(self, threshold: float) -> Tensor:
        """Return the columns from most to least outliers (CLAQ's Outlier Order): [in] int64.

        Ties are broken by the saliency, then by the column's index: at the paper's threshold of 13
        most columns of a small model have no outlier at all, and the order would otherwise be the
        sort's accident.
        """
        counts, saliency = self.outlier_counts(threshold), self.sensitivity()
        return torch.from_numpy(np.lexsort((-saliency.numpy(), -counts.numpy())))
