"""The base of solvers that start from a solution of a column loop, and sweep over its columns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, check_choice
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.solver.base import Solved, describe
from claq_exp.quantize.solver.columns import GroupedSystem, quantize_columns
from claq_exp.quantize.solver.descent import Descent, DescentSystem
from claq_exp.quantize.solver.gptq import Gptq
from claq_exp.quantize.symmetric import permute_

GPTQ, NEAREST = "gptq", "nearest"
STARTS = (GPTQ, NEAREST)


@dataclass(frozen=True)
class Sweeping(Gptq):
    """Start from a column loop's solution, then lower its loss by coordinate descent.

    start: gptq, or nearest.  sweeps: over all columns.
    The other fields are Gptq's.  Where the solver is asymmetric, what is lowered is the distance to
    the original's outputs, |Q x_student - W (x_student + asymmetric (x_teacher - x_student))|^2.
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
        """The Hessian, and columns: as they are, were coded, are missed, multiplied; see Solver."""
        asymmetric = bool(self.asymmetric)
        return 1 + asymmetric, 4 + asymmetric

    def _system(self, moments: Moments, order: Tensor) -> DescentSystem:
        """Do what Gptq does, and keep the Hessian.  Raises as Gptq's."""
        hessian, cross = moments.single().float(), moments.single_cross()
        lost = (
            cross.float().mul_(self.asymmetric) if self.asymmetric and cross is not None else None
        )
        del cross
        found = super()._system(moments, order)
        system = {field.name: getattr(found, field.name) for field in fields(found)}
        permute_(hessian, order)
        hessian.diagonal().add_(found.added[order].float())
        if lost is not None:
            lost = lost.index_select(1, order)
        return DescentSystem(**system, hessian=hessian, lost=lost)

    def solve(self, problem: LinearProblem, prepared: Any, plan: MatrixPlan) -> Solved:
        """Quantize one matrix, see Solver.  prepared: of `DescentSystem`s."""
        statistics = prepared.statistics(problem, plan.row_weights)
        quantizer = plan.codebook.start(statistics, plan.columns)
        loop = prepared
        if self.start == NEAREST:
            loop = _without_compensation(prepared)
        coded = torch.empty(problem.weight.t().shape)
        quantize_columns(problem.weight, loop, quantizer, coded)
        descent = Descent(problem.weight, prepared, quantizer, coded, statistics.importance())
        self._descend(descent, plan.columns)
        solved = describe(problem, prepared, quantizer.payload(), descent.loss())
        return replace(solved, unconverged=quantizer.unconverged)

    @abstractmethod
    def _descend(self, descent: Descent, plan: ColumnPlan) -> None:
        """Lower the loss of a matrix that is coded with a plan."""

    def solve_together(self, *_: object) -> None:
        """Return None: the CPU solves, or a device that multiplies for it; see Solver."""
        return


def _without_compensation(system: Any) -> Any:
    """Return a system, or one of groups, whose column loop rounds to nearest."""
    if isinstance(system, GroupedSystem):
        return replace(system, parts=tuple(map(_without_compensation, system.parts)))
    return replace(system, inverse_factor=None, correction=None)
