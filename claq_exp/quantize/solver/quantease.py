"""Coordinate descent on the codes, from a solution of a column loop."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError, check_choice
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.codebook.base import ColumnQuantizer
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.solver.base import Solved, describe
from claq_exp.quantize.solver.columns import ColumnSystem, quantize_columns
from claq_exp.quantize.solver.compiled import closer, compensate, descend_block
from claq_exp.quantize.solver.gptq import Gptq
from claq_exp.quantize.symmetric import bands, permute_

GPTQ, NEAREST = "gptq", "nearest"
STARTS = (GPTQ, NEAREST)


@dataclass(frozen=True, kw_only=True)
class DescentSystem(ColumnSystem):
    """A column system whose columns are coded again.

    hessian: [in, in] float32, H + diag(added), rows and columns in visiting order.
    lost: [in, in] float32, the solver's share of the cross moment, 2/n * sum of
        (x_teacher - x_student) x_student^T, columns in visiting order and rows in the matrix's own;
        None where nothing is made up for.
    """

    hessian: Tensor
    lost: Tensor | None = None


@dataclass(frozen=True)
class QuantEase(Gptq):
    """Code the columns of a solution again and again, each at its best while all others stay.

    With D = Q - W the loss tr(D H D^T) is least in column j at u_j = q_j - (D H)_j / H_jj, and
    grows by H_jj |q - u_j|^2 around it.  So each column is fitted and coded to u_j, with its
    codebook and its reserved entries; it keeps its old codes where the new ones are no nearer.  The
    loss, damped as GPTQ's, therefore never rises, and the result is never worse than the start.

    start: gptq, or nearest.  sweeps: over all columns.
    The other fields are Gptq's.  Where the solver is asymmetric, the sweeps lower the distance to
    the original's outputs, |Q x_student - W (x_student + asymmetric (x_teacher - x_student))|^2.

    Source: QuantEase (arXiv 2309.01885), eq. 6 and Algorithm 2, in blocks of columns.
    """

    start: str = GPTQ
    sweeps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("solver.start", self.start, STARTS)
        if self.sweeps < 1:
            raise ConfigError(f"solver.sweeps is {self.sweeps}; give a positive number")

    @property
    def passes(self) -> int:
        """The start and the sweeps, see Solver."""
        return 1 + self.sweeps

    @property
    def work(self) -> tuple[int, int]:
        """The Hessian, and the columns as they are, were coded and are missed; see Solver."""
        asymmetric = bool(self.asymmetric)
        return 1 + asymmetric, 3 + asymmetric

    def prepare(self, moments: Moments) -> DescentSystem:
        """Do what Gptq does, and keep the Hessian.  Raises as Gptq's."""
        hessian, cross = moments.single().float(), moments.single_cross()
        lost = (
            cross.float().mul_(self.asymmetric) if self.asymmetric and cross is not None else None
        )
        del cross
        found = super().prepare(moments)
        system = {field.name: getattr(found, field.name) for field in fields(found)}
        order = found.order
        permute_(hessian, order)
        hessian.diagonal().add_(found.added[order].float())
        if lost is not None:
            lost = lost.index_select(1, order)
        return DescentSystem(**system, hessian=hessian, lost=lost)

    def solve(self, problem: LinearProblem, prepared: Any, plan: MatrixPlan) -> Solved:
        """Quantize one matrix, see Solver.  prepared: a `DescentSystem`."""
        statistics = prepared.statistics(problem, plan.row_weights)
        quantizer = plan.codebook.start(statistics, plan.columns)
        loop = prepared
        if self.start == NEAREST:
            loop = replace(prepared, inverse_factor=None, correction=None)
        coded = torch.empty(problem.weight.t().shape)
        quantize_columns(problem.weight, loop, quantizer, coded)
        descent = Descent(problem.weight, prepared, quantizer, coded, statistics.importance())
        self._descend(descent)
        solved = describe(problem, prepared, quantizer.payload(), descent.loss())
        return replace(solved, unconverged=quantizer.unconverged)

    def _descend(self, descent: Descent) -> None:
        """Lower the loss of a matrix that is coded."""
        descent.sweeps(self.sweeps)

    def solve_together(self, *_: object) -> None:
        """Return None: the CPU solves, see Solver."""
        return


class Descent:
    """The sweeps over one matrix, its columns in visiting order.

    weight: [out, in] float32.  quantizer: has coded every column.
    coded: [in, out] float32, the columns that it was given.
    importance: [out] float32, of the rows, for the codebooks and what counts as nearer.
    found: [in, out] float32, the columns as they are stored.
    """

    def __init__(
        self,
        weight: Tensor,
        system: DescentSystem,
        quantizer: ColumnQuantizer,
        coded: Tensor,
        importance: Tensor,
    ) -> None:
        self.system, self.quantizer, self._coded = system, quantizer, coded
        order = system.order
        self.found = quantizer.payload().dequantize().t().index_select(0, order)
        self._missed = self.found - weight.t().index_select(0, order)
        self.importance = importance
        self._wanted = None if system.lost is None else system.lost.t() @ weight.t()

    def sweeps(self, count: int) -> float:
        """Sweep so often, or until nothing changes; return by how much the loss fell."""
        gained = 0.0
        for _ in range(count):
            more = self.sweep()
            if not more:
                break
            gained += more
        return gained

    def sweep(self) -> float:
        """Code every column once more; return by how much the loss fell."""
        hessian, step = self.system.hessian, self.system.block_size
        diagonal, gained = hessian.diagonal(), 0.0
        weights = self.importance.numpy()
        for block in bands(len(hessian), step):
            scale = diagonal[block, None]
            moved = torch.addcdiv(self.found[block], self.slope(block), scale, value=-1)
            gains = _descend(
                self.quantizer,
                self.system.order[block].numpy(),
                moved.numpy(),
                (hessian[block, block] / scale).numpy(),
                self.found[block].numpy(),
                self._coded[block].numpy(),
                weights,
            )
            self._missed[block] += moved
            gained += float(torch.from_numpy(gains) @ scale[:, 0].double())
        return gained

    def slope(self, columns: slice) -> Tensor:
        """Return half of how the loss grows with the stored values of some columns: [some, out]."""
        slope = self.system.hessian[columns] @ self._missed
        if self._wanted is not None:
            slope -= self._wanted[columns]
        return slope

    def settle(self, levels: Tensor, found: Tensor) -> None:
        """Take other levels for the codes as they are, and keep them from now on.

        levels: see `ColumnQuantizer.settle`.  found: [in, out] float32, what is stored then.
        """
        self.quantizer.settle(levels)
        self._missed += found - self.found
        self.found.copy_(found)
        self._coded.copy_(found)  # a column goes back to its levels when it is coded to them

    def loss(self) -> float:
        """Return tr(D (H + diag(added)) D^T) without dead columns."""
        missed = self._missed.clone()
        missed[self.system.dead[self.system.order]] = 0.0
        total = 0.0
        for block in bands(len(missed), self.system.block_size):
            product = self.system.hessian[block] @ missed
            total += float(product.mul_(missed[block]).sum(dtype=torch.float64))
        return total


def _descend(
    quantizer: ColumnQuantizer,
    columns: NDArray[np.int64],
    values: NDArray[np.float32],
    ratios: NDArray[np.float32],
    found: NDArray[np.float32],
    coded: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Code the columns of a block again: `descend_block`, in Python where a codebook is."""
    task = quantizer.compiled()
    if task is not None:
        gains: NDArray[np.float64] = descend_block(
            values, ratios, columns, task, found, coded, weights
        )
        return gains
    gains = np.zeros(len(columns))
    for position, column in enumerate(columns.tolist()):
        compensate(values, ratios, position)
        current, kept = values[position], found[position]
        stored = quantizer.code_column(column, current)
        gain = closer(current, kept, stored, weights)
        if gain >= 0:
            gains[position], coded[position] = gain, current
        else:
            stored = quantizer.code_column(column, coded[position])
        current[:] = stored - kept
        kept[:] = stored
    return gains
