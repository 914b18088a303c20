"""GPTQ's error compensation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.quantize.moments import CROSS, Moments
from claq_exp.quantize.solver.column_loop import ColumnLoop
from claq_exp.quantize.solver.columns import ColumnSystem, GroupedSystem
from claq_exp.quantize.solver.factor import inverse_factor
from claq_exp.quantize.symmetric import bands, permute_, product

ROWS = 256  # of a correction that are found at a time


@dataclass(frozen=True)
class Gptq(ColumnLoop):
    """Spread each column's error over later columns through the inverse Hessian.

    act_order: visit columns by falling Hessian diagonal.
    block_size: columns between two updates of all later columns; changes speed, and the result only
        by rounding.
    damping: share of the mean Hessian diagonal added to the diagonal; ten and a hundred times as
        much where the Cholesky factorization fails.
    asymmetric: how much of what the inputs have lost in the quantized model is made up for by later
        columns, from 0 (nothing; the default) to 1; the published code has 0.25.

    Source: GPTQ (arXiv 2210.17323); GPTAQ (arXiv 2504.02692) for `asymmetric`, with one difference:
    what is made up for is that of the original weight, not that of the weight as earlier columns
    have moved it.  Each step is then the exact minimum of
    |sum over visited j of (w_j x_teacher_j - q_j x_j) + sum over later k of (w_k - v_k) x_k|^2 over
    the later columns v, damped as GPTQ's.
    """

    act_order: bool = True
    block_size: int = 128
    damping: float = 0.01
    asymmetric: float = 0.0

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(
                f"solver.block_size is {self.block_size}; give a positive number of columns"
            )
        if not 0 < self.damping <= 1:
            raise ConfigError(
                f"solver.damping is {self.damping}; give a share of the mean diagonal in (0, 1]"
            )
        if not 0 <= self.asymmetric <= 1:
            raise ConfigError(
                f"solver.asymmetric is {self.asymmetric}; give a share from 0 (off) to 1"
            )

    @property
    def wants(self) -> frozenset[str]:
        """The cross moment, where the solver is asymmetric."""
        return frozenset({CROSS}) if self.asymmetric else frozenset()

    @property
    def row_groups(self) -> bool:
        """Each group has a factor of its own, see Solver."""
        return True

    def prepare(self, moments: Moments) -> ColumnSystem | GroupedSystem:
        """Order the columns and factorize, for each group of rows.

        All groups are visited in one order, by the mean over their Hessians.
        A dead input (H_jj = 0) gets the mean diagonal of the others: its column is rounded to
        nearest, takes no error of others and gives none.  The factor is found in the memory of
        disposable moments.
        Raises NumericalError when no damping makes the Hessian positive definite; it is as before
        then.  Raises ValueError where the cross moment is wanted and was not measured.
        """
        order = self._order(moments)
        if moments.groups == 1:
            return self._system(moments, order)
        parts = []
        for group, hessian in enumerate(moments.hessian):
            cross = None if moments.cross is None else moments.cross[group]
            own = Moments(hessian, cross, moments.tokens, wide=moments.wide)
            parts.append(self._system(own, order))
        if moments.disposable:
            moments.use_up()
        return GroupedSystem.of(parts)

    def _order(self, moments: Moments) -> Tensor:
        """Return the columns as they are visited: [in] int64."""
        diagonal = moments.hessian.diagonal(dim1=1, dim2=2).mean(dim=0)
        if not self.act_order:
            return torch.arange(len(diagonal), device=diagonal.device)
        return torch.argsort(_filled(diagonal), descending=True, stable=True)

    def _system(self, moments: Moments, order: Tensor) -> ColumnSystem:
        """Factorize for all rows, or a group of them; see `prepare`."""
        hessian, cross = moments.single(), moments.single_cross()
        if self.asymmetric and cross is None:
            raise ValueError("an asymmetric solver needs the cross moment of teacher and student")
        diagonal = hessian.diagonal().clone()
        dead = diagonal == 0
        filled = _filled(diagonal)
        backwards = order.flip(0)
        matrix = hessian
        if not (moments.disposable and hessian.is_contiguous()):
            matrix = hessian.clone(memory_format=torch.contiguous_format)
        permute_(matrix, backwards)
        matrix.diagonal().copy_(filled[backwards])
        try:
            factor, damping = inverse_factor(matrix, self.damping, wide=moments.wide)
        except NumericalError:
            permute_(matrix, torch.argsort(backwards))
            matrix.diagonal().copy_(diagonal)
            raise
        correction = None
        if cross is not None and self.asymmetric:
            correction = correction_of(cross, order, factor, wide=moments.wide)
            correction.mul_(self.asymmetric)
        del cross
        if moments.disposable:
            moments.use_up()
        weight = torch.empty(len(order), dtype=torch.float32, device=hessian.device)
        weight[order] = factor.diagonal().square().reciprocal()
        return ColumnSystem(
            order=order,
            inverse_factor=factor,
            distortion_weight=weight,
            damping=damping,
            added=damping * filled.mean() + torch.where(dead, filled, 0.0),
            dead=dead,
            block_size=self.block_size,
            wide=moments.wide,
            raised=damping > self.damping,
            nearest="unfed" if dead.all() else "",
            correction=correction,
            diagonal=diagonal.float(),
        )


def _filled(diagonal: Tensor) -> Tensor:
    """Return a Hessian's diagonal with the mean of the others, or 1, in the place of zeros."""
    dead = diagonal == 0
    fill = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    return torch.where(dead, fill, diagonal)


def correction_of(cross: Tensor, order: Tensor, factor: Tensor, *, wide: bool = False) -> Tensor:
    """Return P = strict_upper(D U^T) U: [in, in] float32, rows and columns in visiting order.

    cross: [in, in] float64, 2/n * sum of (x_teacher - x_student) x_student^T, columns in the
        matrix's own order; D is the same in visiting order.
    order: [in] int64.  factor: U, [in, in] float32 upper, U^T U = the damped inverse Hessian.
    wide: sums are in float64.
    Row j is D[j, F] H_F^-1 on the columns F behind j: the weights of F that come nearest to what
    input j has lost, per unit of weight (GPTAQ, arXiv 2504.02692).
    """
    correction = torch.zeros_like(factor, memory_format=torch.contiguous_format)
    for band in bands(len(order), ROWS):
        left = factor[band.start :, band.start :]
        lost = cross.index_select(0, order[band]).index_select(1, order[band.start :]).float()
        ahead = product(lost, left.t(), wide=wide).triu_(1)
        correction[band, band.start :] = product(ahead, left, wide=wide)
    return correction
