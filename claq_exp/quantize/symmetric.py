"""Work on a large symmetric matrix a band of rows at a time, so that it needs no second one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BAND = 64  # rows


def bands(length: int, size: int = BAND) -> Iterator[slice]:
    """Yield the rows of a matrix, `size` at a time."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def mirror_(matrix: Tensor) -> None:
    """Copy what stands above the diagonal to below it."""
    for band in bands(len(matrix)):
        matrix[band.stop :, band] = matrix[band, band.stop :].t()
        corner = matrix[band, band]
        corner.copy_(corner.triu() + corner.triu(1).t())


def permute_(matrix: Tensor, order: Tensor) -> None:
    """Bring rows and columns into an order: [n] int64."""
    for band in matrix.split(BAND):
        band.copy_(band.index_select(1, order))
    for band in matrix.split(BAND, dim=1):
        band.copy_(band.index_select(0, order))


def is_finite(matrix: Tensor) -> bool:
    """Tell whether all entries are numbers: NaN and infinite ones do not leave a sum."""
    sums = (matrix[band].sum(dtype=torch.float64) for band in bands(len(matrix)))
    return all(bool(torch.isfinite(total)) for total in sums)


def product(left: Tensor, right: Tensor, *, wide: bool) -> Tensor:
    """Return a product of float32 matrices as float32.  wide: sums are in float64."""
    return (left.double() @ right.double()).float() if wide else left @ right


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Return tr(W H W^T): products in float32, their sum in float64.

    weight: [out, in] float32.  hessian: [in, in] float64, symmetric.
    """
    total = 0.0
    for band in bands(len(hessian)):
        later = slice(band.start, None)
        row = hessian[band, later].to(weight.dtype, copy=True)
        row[:, band.stop - band.start :] *= 2  # stands for the column below the diagonal as well
        product = weight[:, later] @ row.t()
        total += float(product.mul_(weight[:, band]).sum(dtype=torch.float64))
    return total
