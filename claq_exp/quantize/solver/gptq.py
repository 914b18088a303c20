"""GPTQ's error compensation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.solver.column_loop import ColumnLoop
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.solver.factor import inverse_factor
from claq_exp.quantize.symmetric import permute_


@dataclass(frozen=True)
class Gptq(ColumnLoop):
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

    def prepare(self, moments: Moments) -> ColumnSystem:
        """Order the columns and factorize.

        A dead input (H_jj = 0) gets the mean diagonal of the others: its column is rounded to
        nearest, takes no error of others and gives none.  The factor is found in the memory of
        disposable moments.
        Raises NumericalError when no damping makes the Hessian positive definite; it is as before
        then.
        """
        hessian = moments.single()
        diagonal = hessian.diagonal().clone()
        dead = diagonal == 0
        fill = diagonal[~dead].mean() if not dead.all() else hessian.new_ones(())
        filled = torch.where(dead, fill, diagonal)
        order = (
            torch.argsort(filled, descending=True, stable=True)
            if self.act_order
            else torch.arange(len(filled), device=hessian.device)
        )
        backwards = order.flip(0)
        matrix = hessian
        if not (moments.disposable and hessian.is_contiguous()):
            matrix = hessian.clone(memory_format=torch.contiguous_format)
        permute_(matrix, backwards)
        matrix.diagonal().copy_(filled[backwards])
        try:
            factor, damping = inverse_factor(matrix, self.damping)
        except NumericalError:
            permute_(matrix, torch.argsort(backwards))
            matrix.diagonal().copy_(diagonal)
            raise
        if moments.disposable:
            moments.use_up()
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
            raised=damping > self.damping,
            nearest="unfed" if dead.all() else "",
        )
