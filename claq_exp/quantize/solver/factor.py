"""The factor of an inverse Hessian, found in the Hessian's own memory."""

from __future__ import annotations

import torch
from torch import Tensor

from claq_exp.errors import NumericalError
from claq_exp.quantize.symmetric import bands, is_finite, mirror_
from claq_exp.system.heap import forget

CHUNK = 1 << 20  # numbers that change places at a time
LADDER = (1.0, 10.0, 100.0)  # multiples of the damping that are tried in turn
BLOCK = 256  # columns that are factorized at a time


def inverse_factor(matrix: Tensor, damping: float, *, wide: bool = False) -> tuple[Tensor, float]:
    """Return (upper U with U^T U = (H + damping * mean(diag H) I)^-1, the damping that worked).

    matrix: [in, in] float64, contiguous, H from its last column to its first.  Overwritten; it is
        as before where this raises NumericalError, because no damping was enough.
    With H = R R^T, R upper (a Cholesky factorization from the last column up), U is simply R^-1.
    U is float32 and well conditioned, for the damping bounds it.
    wide: R is inverted in float64, on the CPU, and U has its rounding alone.
    """
    diagonal = matrix.diagonal().clone()
    on_cpu = matrix.device.type == "cpu"
    for step in LADDER:
        used = min(damping * step, 1.0)
        matrix.diagonal().copy_(diagonal + used * diagonal.mean())
        factor = _find(matrix, wide) if on_cpu else _find_on_gpu(matrix)
        if factor is not None and is_finite(factor):
            return factor, used
        mirror_(matrix)
    matrix.diagonal().copy_(diagonal)
    smallest = torch.linalg.eigvalsh(matrix)[0].item()
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {used} (smallest eigenvalue "
        f"{smallest:.3g}); use more calibration tokens or a larger solver.damping"
    )


def _find(matrix: Tensor, wide: bool) -> Tensor | None:
    """Return the factor in the matrix's own memory; None where there is none.

    In that case what is above the diagonal stays.
    """
    if not _cholesky_(matrix) or not _fits(matrix.diagonal()):
        return None
    factor = matrix if wide else _narrowed(matrix)
    _turn_(factor)
    _invert_(factor)
    return _narrowed(factor) if wide else factor


def _fits(diagonal: Tensor) -> bool:
    """Tell whether a triangle with this diagonal has an inverse in float32."""
    limits = torch.finfo(torch.float32)
    return bool((diagonal > limits.tiny).all() and (diagonal < limits.max).all())


def _narrowed(matrix: Tensor) -> Tensor:
    """Return a matrix in float32.

    matrix: [n, n] float64, contiguous.  The result lies in the first half of its memory, and the
    second half is given back: a row never reaches what is still to be read.
    """
    size = len(matrix)
    flat = matrix.reshape(-1).view(torch.float32)
    narrow = flat[: size * size]
    for band in bands(size):
        narrow.view(size, size)[band] = matrix[band].float()
    forget(flat[size * size :])
    return narrow.view(size, size)


def _turn_(matrix: Tensor) -> None:
    """Have the lower triangle alone, from its last row and column to its first: [n, n]."""
    size, flat = len(matrix), matrix.view(-1)
    for band in bands(size):
        matrix[band].tril_(band.start)
    for start in range(0, size * size // 2, CHUNK):
        stop = min(start + CHUNK, size * size // 2)
        first, last = flat[start:stop], flat[size * size - stop : size * size - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def _cholesky_(matrix: Tensor) -> bool:
    """Write L with L L^T = matrix below the diagonal and on it; False where there is none.

    torch's own needs a second matrix and loses what is above the diagonal; a LAPACK beside torch's
    has threads of its own, which wait by turning, and crawls on a machine that others use too.
    """
    for band in bands(len(matrix), BLOCK):
        done, rows = slice(0, band.start), slice(band.start, None)
        left = torch.addmm(matrix[rows, band], matrix[rows, done], matrix[band, done].t(), alpha=-1)
        width = left.shape[1]
        lower, failed = torch.linalg.cholesky_ex(left[:width])
        if failed:
            return False
        corner = matrix[band, band]
        corner.copy_(lower + corner.triu(1))
        matrix[band.stop :, band] = torch.linalg.solve_triangular(
            lower.t(), left[width:], upper=True, left=False
        )
    return True


def _invert_(upper: Tensor) -> None:
    """Replace an upper triangular matrix by its inverse."""
    for band in bands(len(upper), BLOCK):
        corner = upper[band, band]
        identity = torch.eye(len(corner), dtype=upper.dtype, device=upper.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
        moved = upper[: band.start, band] @ -inverse
        corner.copy_(inverse)
        for rows in bands(band.start, BLOCK):
            upper[rows, band] = upper[rows, rows.start : band.start] @ moved[rows.start :]


def _find_on_gpu(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    identity = torch.eye(len(matrix), device=matrix.device)
    return torch.linalg.solve_triangular(lower.float(), identity, upper=False).flip(0, 1)
