"""Quantizes the matrices of a group on a GPU, where the recipe is one that its kernel knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from claq_exp.errors import NumericalError
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook.base import DeviceRule
from claq_exp.quantize.codebook.kmeans import root_mean_squares
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.reservation.shares import MAGNITUDE
from claq_exp.quantize.solver.base import Solved, describe
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.solver.device_columns import quantize_group_on_device

WIDEST = 5  # the kernel's clustering falls behind the CPU's beyond


def solve_on_device(
    problems: Sequence[LinearProblem],
    system: ColumnSystem,
    plans: Sequence[MatrixPlan],
    device: torch.device,
) -> list[Solved] | None:
    """Quantize matrices that share their input, all at once; None where the CPU must do it.

    problems: on the CPU.  system: on either.  plans: of each problem.
    The kernel knows k-means with a codebook per column, up to 5 bits, and reservation by magnitude.
    Raises NumericalError that names the matrices.
    """
    rules = {plan.codebook.device_rule() if _known(plan.columns) else None for plan in plans}
    if len(rules) > 1 or None in rules:
        return None
    scaled = DeviceRule(row_scales=True) in rules
    weighted = any(plan.row_weights is not None for plan in plans)
    try:
        quantized = quantize_group_on_device(
            [problem.weight for problem in problems],
            system,
            [plan.columns.column_bits for plan in plans],
            [plan.columns.reserved_counts for plan in plans],
            device,
            row_scales=[root_mean_squares(p.weight) for p in problems] if scaled else None,
            row_weights=[
                torch.ones(len(problem.weight)) if plan.row_weights is None else plan.row_weights
                for problem, plan in zip(problems, plans, strict=True)
            ]
            if weighted
            else None,
        )
        return [
            describe(problem, system.outline, found)
            for problem, found in zip(problems, quantized, strict=True)
        ]
    except NumericalError as error:
        names = ", ".join(problem.name for problem in problems)
        raise NumericalError(f"{names}: {error}") from error


def _known(columns: ColumnPlan) -> bool:
    return columns.select == MAGNITUDE and int(columns.column_bits.max()) <= WIDEST
