"""The base of solvers that visit one column after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch

from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.solver.base import Solved, Solver, describe
from claq_exp.quantize.solver.columns import (
    ColumnSystem,
    GroupedSystem,
    damped_loss,
    parts_of,
    quantize_columns,
)
from claq_exp.quantize.solver.device import solve_on_device


class ColumnLoop(Solver, ABC):
    """A solver that quantizes each column once and spreads its error over the columns that follow.

    What it prepares says in which order, and how far errors go.
    """

    @abstractmethod
    def prepare(self, moments: Moments) -> ColumnSystem | GroupedSystem:
        """Turn a Hessian into an order and a compensation, see Solver."""

    def solve(
        self, problem: LinearProblem, prepared: ColumnSystem | GroupedSystem, plan: MatrixPlan
    ) -> Solved:
        """Quantize one matrix, see Solver."""
        statistics = prepared.statistics(problem, plan.row_weights)
        quantizer = plan.codebook.start(statistics, plan.columns)
        loss = quantize_columns(problem.weight, prepared, quantizer)
        first, _ = parts_of(prepared, len(problem.weight))[0]
        known = None if first.inverse_factor is None else loss
        quantized = quantizer.payload()
        if first.correction is not None:  # the loop's own loss is that of another target
            known = damped_loss(quantized.dequantize().sub_(problem.weight), prepared)
        solved = describe(problem, prepared, quantized, known)
        return replace(solved, unconverged=quantizer.unconverged)

    def solve_together(
        self,
        problems: Sequence[LinearProblem],
        prepared: ColumnSystem | GroupedSystem,
        plans: Sequence[MatrixPlan],
        device: torch.device,
    ) -> list[Solved] | None:
        """Quantize matrices by the device's kernel where it knows their codebooks, see Solver."""
        if isinstance(prepared, GroupedSystem):
            return None
        return solve_on_device(problems, prepared, plans, device)
