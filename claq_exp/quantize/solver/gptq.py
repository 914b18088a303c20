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
        ordered = hessian[order][:, order]
        ordered.diagonal().copy_(filled[order])
        factor, damping = _inverse_factor(ordered, self.damping)
        weight = torch.empty(len(order), dtype=torch.float32, device=hessian.device)
        weight[order] = factor.diagonal().square().reciprocal().float()
        return ColumnSystem(
            order=order,
            inverse_factor=factor.float(),
            distortion_weight=weight,
            damping=damping,
            added=damping * filled.mean() + torch.where(dead, fill, 0.0),
            dead=dead,
            block_size=self.block_size,
        )


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return (upper U with U^T U = (H + damping * mean(diag H) I)^-1, the damping that worked).

    With H = R R^T, R upper (a Cholesky factorization from the last column up), U is simply R^-1.
    """
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    for step in LADDER:
        used = min(damping * step, 1.0)
        damped = hessian + used * mean * identity
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if torch.isfinite(factor).all():
                return factor, used
    smallest = torch.linalg.eigvalsh(hessian)[0].item()
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {used} (smallest eigenvalue "
        f"{smallest:.3g}); "
        "use more calibration tokens or a larger solver.damping"
    )
