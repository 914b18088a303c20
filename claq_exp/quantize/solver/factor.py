"""The factor of an inverse Hessian, found in the Hessian's own memory."""

from __future__ import annotations

from functools import cache

import torch
from scipy.linalg import lapack
from threadpoolctl import ThreadpoolController
from torch import Tensor

from claq_exp.errors import NumericalError
from claq_exp.quantize.symmetric import bands, is_finite, mirror_

LADDER = (1.0, 10.0, 100.0)  # multiples of the damping that are tried in turn


def inverse_factor(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return (upper U with U^T U = (H + damping * mean(diag H) I)^-1, the damping that worked).

    matrix: [in, in] float64, contiguous, H from its last column to its first.  Overwritten; it is
        as before where this raises NumericalError, because no damping was enough.
    With H = R R^T, R upper (a Cholesky factorization from the last column up), U is simply R^-1.
    U is float32 and well conditioned, for the damping bounds it.
    """
    diagonal = matrix.diagonal().clone()
    find = _find if matrix.device.type == "cpu" else _find_on_gpu
    for step in LADDER:
        used = min(damping * step, 1.0)
        matrix.diagonal().copy_(diagonal + used * diagonal.mean())
        factor = find(matrix)
        if factor is not None and is_finite(factor):
            return factor, used
        mirror_(matrix)
    matrix.diagonal().copy_(diagonal)
    smallest = torch.linalg.eigvalsh(matrix)[0].item()
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {used} (smallest eigenvalue "
        f"{smallest:.3g}); use more calibration tokens or a larger solver.damping"
    )


def _find(matrix: Tensor) -> Tensor | None:
    """Return the factor, or None where there is none; what is above the diagonal stays.

    LAPACK reads a matrix column by column, so that it sees the transpose of each.
    """
    size = len(matrix)
    with _libraries().limit(limits=torch.get_num_threads(), user_api="blas"):
        _, failed = lapack.dpotrf(matrix.numpy().T, lower=0, clean=0, overwrite_a=1)
        if failed:
            return None
        factor = torch.empty(size, size, device=matrix.device)
        for band in bands(size):
            rows = slice(size - band.stop, size - band.start)
            factor[rows] = matrix[band].tril(band.start).flip(0, 1)
        _, failed = lapack.strtri(factor.numpy().T, lower=1, overwrite_c=1)
    return None if failed else factor


def _find_on_gpu(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    identity = torch.eye(len(matrix), device=matrix.device)
    return torch.linalg.solve_triangular(lower.float(), identity, upper=False).flip(0, 1)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()
