"""GPTQ's error compensation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.quantize.solver.columns import ColumnSystem

LADDER = (1.0, 10.0, 100.0)  # multiples of the damping that are tried in turn


@dataclass(frozen=True)
class Gptq:
    """Spread each column's error over later columns through the inverse Hessian.

    act_order: visit columns by falling Hessian diagonal.
    block_size: columns between two updates of all later columns; changes speed, and the result only
        by rounding.
    damping: share of the mean Hessian diagonal added to the diagonal; ten and a hundred times as
        much where the Cholesky factorization fails.

    Source: GPTQ (arXiv 2210.17323).
    """

    act_order: bool = True
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(
                f"solver.block_size is {self.block_size}; give a positive number of columns"
            )
        if not 0 < self.damping <= 1:
            raise ConfigError(
                f"solver.damping is {self.damping}; give a share of the mean diagonal in (0, 1]"
            )

    def prepare(self, hessian: Tensor) -> ColumnSystem:
        """Order the columns and factorize.

        A dead input (H_jj = 0) gets the mean diagonal of the others: its column is rounded to
        nearest, takes no error of others and gives none.  Raises NumericalError when no damping
        makes the Hessian positive
        definite.
        """
        diagonal = hessian.diagonal()
        dead = diagonal == 0
        fill = diagonal[~dead].mean() if not dead.all() else hessian.new_ones(())
        filled = torch.where(dead, fill, diagonal)
        order = (
            torch.argsort(filled, descending=True, stable=True)
            if self.act_order
            else torch.arange(len(filled), device=hessian.device)
        )
        backwards = order.flip(0)
        reversed_ = hessian.index_select(0, backwards).index_select(1, backwards)
        reversed_.diagonal().copy_(filled[backwards])
        factor, damping = _inverse_factor(reversed_, self.damping)
        weight = torch.empty(len(order), dtype=torch.float32, device=hessian.device)
        weight[order] = factor.diagonal().square().reciprocal()
        return ColumnSystem(
            order=order,
            inverse_factor=factor,
            distortion_weight=weight,
            damping=damping,
            added=damping * filled.mean() + torch.where(dead, fill, 0.0),
            dead=dead,
            block_size=self.block_size,
        )


def _inverse_factor(reversed_: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return (upper U with U^T U = (H + damping * mean(diag H) I)^-1, the damping that worked).

    reversed_: [in, in] float64, H from its last column to its first; its diagonal is overwritten.
    With H = R R^T, R upper (a Cholesky factorization from the last column up), U is simply R^-1.
    """
    diagonal = reversed_.diagonal().clone()
    identity = torch.eye(len(diagonal), device=diagonal.device)
    for step in LADDER:
        used = min(damping * step, 1.0)
        reversed_.diagonal().copy_(diagonal + used * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        if not failed:
            lower = lower.float()  # well conditioned, for the damping bounds its inverse
            factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if torch.isfinite(factor).all():
                return factor, used
    reversed_.diagonal().copy_(diagonal)
    smallest = torch.linalg.eigvalsh(reversed_)[0].item()
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {used} (smallest eigenvalue "
        f"{smallest:.3g}); "
        "use more calibration tokens or a larger solver.damping"
    )
