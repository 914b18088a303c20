"""Quantizes the matrices of a group on a GPU, where the recipe is one that its kernel knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from claq_exp.errors import NumericalError
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.codebook.kmeans import root_mean_squares
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, Solved, decide, describe
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.solver.device_columns import quantize_group_on_device

WIDEST = 5  # the kernel's clustering falls behind the CPU's beyond


def solve_on_device(
    problems: Sequence[LinearProblem],
    system: ColumnSystem,
    recipe: Recipe,
    plans: Mapping[str, MatrixPlan],
    device: torch.device,
) -> list[Solved] | None:
    """Quantize matrices that share their input, all at once; None where the CPU must do it.

    problems: on the CPU.  system: on either.  plans: what was decided before of matrices by name.
    The kernel knows k-means with a codebook per column, up to 5 bits, and reservation by magnitude.
    Raises NumericalError that names the matrices.
    """
    on_cpu = replace(system, inverse_factor=None).cpu()  # which no one asks for there
    decided = [decide(problem, on_cpu, recipe, plans.get(problem.name))[1] for problem in problems]
    codebooks = [plan.codebook for plan in decided if _known(plan)]
    scaled = {codebook.row_scales for codebook in codebooks if isinstance(codebook, KMeans)}
    if len(codebooks) < len(decided) or len(scaled) > 1:
        return None
    weighted = any(plan.row_weights is not None for plan in decided)
    try:
        quantized = quantize_group_on_device(
            [problem.weight for problem in problems],
            system,
            [plan.columns.column_bits for plan in decided],
            [plan.columns.reserved_counts for plan in decided],
            device,
            row_scales=[root_mean_squares(p.weight) for p in problems] if True in scaled else None,
            row_weights=[
                torch.ones(len(problem.weight)) if plan.row_weights is None else plan.row_weights
                for problem, plan in zip(problems, decided, strict=True)
            ]
            if weighted
            else None,
        )
        return [
            describe(problem, on_cpu, found)
            for problem, found in zip(problems, quantized, strict=True)
        ]
    except NumericalError as error:
        names = ", ".join(problem.name for problem in problems)
        raise NumericalError(f"{names}: {error}") from error


def _known(plan: MatrixPlan) -> bool:
    codebook = plan.codebook
    return (
        type(codebook) is KMeans
        and not codebook.shared
        and not codebook.fit_reserved
        and plan.columns.select == "magnitude"
        and int(plan.columns.column_bits.max()) <= WIDEST
    )
