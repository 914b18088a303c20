"""The best levels of tables for codes that stay, in closed form or by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.quantize.symmetric import bands, product

ROWS = 128  # whose systems are solved at a time
STEPS = 8  # of conjugate gradients, at most
SETTLED = 1e-4  # of the first residual's norm, where they stop


@dataclass(frozen=True)
class Assignment:
    """Which level each weight has: columns in visiting order.

    hessian: [in, in] float32, H + diag(added).
    codes: [in, out] int64.  free: [in, out] bool: the others are no levels, and stay as they are.
    wide: products are summed in float64.
    """

    hessian: Tensor
    codes: Tensor
    free: Tensor
    wide: bool = False


def row_steps(assigned: Assignment, slope: Tensor, entries: int) -> Tensor:
    """Return what to add to the levels of each row: [out, entries] float64.

    slope: [in, out] float32, D H, see `Descent.slope`.
    With P [in, entries] the one-hot codes of a row, the loss (P c - w)^T H (P c - w) is least at
    c = (P^T H P)^-1 P^T H w (LNQ, GuidedQuant's appendix, arXiv 2505.07004).  From levels c_0 with
    D = P c_0 - w that is the step -(P^T H P)^-1 P^T H D: small numbers keep their digits.  A level
    that no column has stays, and so does a row whose system cannot be factorized.
    """
    found = [
        _row_steps(
            assigned,
            assigned.codes[:, band].t(),
            assigned.free[:, band].t(),
            slope[:, band].t(),
            entries,
        )
        for band in bands(assigned.codes.shape[1], ROWS)
    ]
    return torch.cat(found)


def _row_steps(
    assigned: Assignment, codes: Tensor, free: Tensor, slope: Tensor, entries: int
) -> Tensor:
    """Do what `row_steps` does for some rows: codes, free and slope of these, [rows, in]."""
    shape = len(codes), entries
    used = free.double()
    systems = torch.empty(*shape, entries, dtype=torch.float64)
    for entry in range(entries):
        chosen = ((codes == entry) & free).float()
        products = product(chosen, assigned.hessian, wide=assigned.wide).double() * used
        systems[:, entry] = products.new_zeros(shape).scatter_add_(1, codes, products)
    sides = used.new_zeros(shape).scatter_add_(1, codes, slope.double() * used)
    systems = 0.5 * (systems + systems.mT)
    diagonal = systems.diagonal(dim1=1, dim2=2)
    empty = ~(diagonal > 0)
    diagonal.masked_fill_(empty, 1.0)
    factors, failed = torch.linalg.cholesky_ex(systems)
    steps = torch.cholesky_solve(sides[:, :, None], factors)[:, :, 0]
    return -torch.where((failed > 0)[:, None] | empty, torch.zeros(()).double(), steps)


def column_steps(
    assigned: Assignment, slope: Tensor, entries: int, scales: Tensor, importance: Tensor
) -> Tensor:
    """Return what to add to the levels of each column, in visiting order: [in, entries] float64.

    slope: as of `row_steps`.  scales, importance: [out] float32, of the rows.
    The levels of all columns hang together: a row has one of each.  With w_ij = s_i c_j,k for
    k = k_ij and an importance g_i of the rows, setting the gradient to zero gives, for every column
    j and level k,

        sum_l H_jl sum_m N_jk,lm c_lm = sum of g_i s_i (W H)_ij over the rows i with k_ij = k,

    N_jk,lm the sum of g_i s_i^2 over the rows with k_ij = k and k_il = m.  The system has in *
    entries unknowns and is never built: conjugate gradients multiply by it with one product D H of
    the size of the matrix.  It is positive semidefinite (a Hadamard product of two such), and every
    step lowers the loss, so that they may stop early.  Their preconditioner is the diagonal,
    H_jj N_jk,jk, the exact system of a column alone.
    """
    hessian, codes = assigned.hessian, assigned.codes
    rates = torch.where(assigned.free, scales, 0.0)
    weights = importance * scales

    def summed(matrix: Tensor) -> Tensor:
        """Sum [in, out] over the rows of each level: [in, entries] float64."""
        masked = torch.where(assigned.free, matrix * weights, 0.0).double()
        return masked.new_zeros(len(codes), entries).scatter_add_(1, codes, masked)

    def multiplied(step: Tensor) -> Tensor:
        moved = step.float().gather(1, codes) * rates
        return summed(product(hessian, moved, wide=assigned.wide))

    diagonal = summed(scales.expand(codes.shape)) * hessian.diagonal()[:, None].double()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    return _conjugate_gradients(multiplied, -summed(slope), inverse)


def _conjugate_gradients(multiplied, side: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Return nearly the x with multiplied(x) = side, starting from 0; all float64 of one shape."""
    found, residual = torch.zeros_like(side), side.clone()
    turned = inverse * residual
    direction, size = turned.clone(), float((residual * turned).sum())
    least = SETTLED**2 * size
    for _ in range(STEPS):
        if not size > least:
            break
        changed = multiplied(direction)
        curvature = float((direction * changed).sum())
        if not curvature > 0:
            break
        found.add_(direction, alpha=size / curvature)
        residual.add_(changed, alpha=-size / curvature)
        turned = inverse * residual
        before, size = size, float((residual * turned).sum())
        direction.mul_(size / before).add_(turned)
    return found
