"""A solver of one's own that is no column loop: in runs, `own_solvers:CyclicDescent`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.moments import CROSS, OUTPUT_GRADIENTS, Moments
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.solver.base import Prepared, Solved, Solver, describe


@dataclass(frozen=True, kw_only=True)
class Curvature(Prepared):
    """hessian: [in, in] float64, of all rows."""

    hessian: torch.Tensor


@dataclass(frozen=True)
class CyclicDescent(Solver):
    """Round to nearest; then give one column after another its best codes, the others fixed.

    With D = Q - W, the best column j is the nearest level to w_j - sum over k != j of D_k H_kj /
    H_jj (QuantEase, arXiv 2309.01885, eq. 6).  No error of a column is passed on.

    sweeps: over all columns.
    """

    sweeps: int = 2

    def prepare(self, moments: Moments) -> Curvature:
        hessian = moments.single().clone()
        diagonal = hessian.diagonal()
        return Curvature(
            order=torch.arange(len(diagonal), device=diagonal.device),
            distortion_weight=diagonal.float(),
            dead=diagonal == 0,
            added=torch.zeros_like(diagonal),
            hessian=hessian,
        )

    def solve(self, problem: LinearProblem, prepared: Curvature, plan: MatrixPlan) -> Solved:
        statistics = prepared.statistics(problem, plan.row_weights)
        quantizer = plan.codebook.start(statistics, plan.columns)
        weight, hessian = problem.weight.double(), prepared.hessian
        found = weight.clone()
        for sweep in range(self.sweeps + 1):
            for column in range(weight.shape[1]):
                best = weight[:, column]
                if sweep and not prepared.dead[column]:
                    missed = found - weight
                    missed[:, column] = 0
                    best = best - missed @ hessian[:, column] / hessian[column, column]
                coded = quantizer.code_column(column, best.float().numpy())
                found[:, column] = torch.from_numpy(coded)
        return describe(problem, prepared, quantizer.payload())


@dataclass(frozen=True)
class Asymmetric(CyclicDescent):
    """One that would follow the original's outputs."""

    wants: ClassVar[frozenset[str]] = frozenset({CROSS})

    def prepare(self, moments: Moments) -> Curvature:
        assert moments.cross is not None
        return super().prepare(moments)


@dataclass(frozen=True)
class Weighted(CyclicDescent):
    """One that would weigh outputs."""

    wants: ClassVar[frozenset[str]] = frozenset({OUTPUT_GRADIENTS})
