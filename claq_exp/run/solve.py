"""Solves the linears of a group side by side, and describes each solution."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from claq_exp.errors import NumericalError
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, decide, quantize_weight
from claq_exp.quantize.solver import Nearest
from claq_exp.quantize.solver.base import Prepared, Solved

CPU = torch.device("cpu")


def solve_linears(
    weights: Mapping[str, Tensor],
    moments: Moments,
    recipe: Recipe,
    plans: Mapping[str, MatrixPlan] | None = None,
    device: torch.device = CPU,
    *,
    strict: bool = False,
) -> list[tuple[Solved, float]]:
    """Quantize the linears that share an input; return (solution, seconds) of each.

    Where the solver cannot prepare itself (gptq: a Hessian that no damping makes positive definite)
    they are rounded to nearest; `strict` refuses that.

    weights: full name -> [out, in] float32 on the CPU.
    moments: of their input, on the CPU; a solver may use up disposable ones.
    plans, device: as in `solve_group`.
    Raises NumericalError that names a layer.
    """
    retreats, hessian = 0, moments.hessian
    problems = [LinearProblem(weight, hessian, name) for name, weight in weights.items()]
    energies = [problem.energy() for problem in problems]
    name = problems[0].name
    del hessian, problems  # the solver may need the memory
    try:
        recipe, prepared = _prepare(recipe, moments, device, name, strict)
    except torch.OutOfMemoryError:
        device, retreats = CPU, 1
        recipe, prepared = _prepare(recipe, moments, device, name, strict)
    left = None if moments.used_up else moments.hessian
    problems = [
        LinearProblem(weight, left, name, known_energy=energy)
        for (name, weight), energy in zip(weights.items(), energies, strict=True)
    ]
    solutions = solve_group(problems, prepared, recipe, plans, device)
    return [
        (replace(solved, retreats=solved.retreats + retreats), seconds)
        for solved, seconds in solutions
    ]


def _prepare(
    recipe: Recipe, moments: Moments, device: torch.device, name: str, strict: bool
) -> tuple[Recipe, Prepared]:
    """Return what the solver prepares, and the recipe with the solver that did it."""
    try:
        return recipe, recipe.solver.prepare(moments.to(device))
    except NumericalError as error:
        if strict:
            raise NumericalError(f"{name}: strict=true, and {error}") from error
        prepared = replace(Nearest().prepare(moments), nearest="indefinite")
        return recipe.nearest(), prepared


def solve_group(
    problems: list[LinearProblem],
    prepared: Prepared,
    recipe: Recipe,
    plans: Mapping[str, MatrixPlan] | None = None,
    device: torch.device = CPU,
) -> list[tuple[Solved, float]]:
    """Solve matrices that share their input side by side; return (solution, seconds) of each.

    plans: what was decided before of the matrices of these names.  device: where to solve, if the
    solver can do it there; the CPU takes what a GPU cannot, and what it has no memory for.
    """
    plans, retreats = plans or {}, 0
    if device != CPU:
        started = time.perf_counter()
        try:
            decided = [decide(p, prepared.outline, recipe, plans.get(p.name)) for p in problems]
            together = recipe.solver.solve_together(problems, prepared, decided, device)
        except torch.OutOfMemoryError:
            together, retreats = None, 1
        if together is not None:
            each = (time.perf_counter() - started) / len(problems)
            return [(solved, each) for solved in together]
        prepared = prepared.at_hand() if recipe.solver.multiplies_on_device else prepared.cpu()

    def solve(problem: LinearProblem) -> tuple[Solved, float]:
        started, again, plan = time.perf_counter(), 0, plans.get(problem.name)
        try:
            try:
                solved = quantize_weight(problem, prepared, recipe, plan)
            except torch.OutOfMemoryError:
                again = 1
                solved = quantize_weight(problem, prepared.cpu(), recipe, plan)
        except NumericalError as error:
            raise NumericalError(f"{problem.name}: {error}") from error
        return replace(solved, retreats=retreats + again), time.perf_counter() - started

    threads = torch.get_num_threads()
    each = max(1, threads // len(problems))
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(each,))
    try:
        with pool:
            return list(pool.map(solve, problems))
    finally:
        torch.set_num_threads(threads)


def report_row(
    index: int | None, name: str, solved: Solved, tokens: int | None, seconds: float
) -> dict[str, Any]:
    """Return the row of layers.csv of a linear; what did not happen is None.

    index: of its block; None for the embedding and the head.  tokens: that it saw; None for an
    embedding, which is not multiplied.
    """
    layout = solved.quantized.layout()
    return {
        "block": index,
        "name": name,
        "rows": layout.rows,
        "cols": layout.columns,
        "nominal_bits": layout.nominal_bits(),
        "bits": layout.ledger().total / layout.weights,
        "reserved": layout.reserved,
        "output_error": solved.output_error,
        "weight_error": solved.weight_error,
        "damping": solved.damping,
        "raised_damping": solved.damping if solved.raised else None,
        "dead_columns": solved.dead_columns,
        "nearest": solved.nearest or None,
        "clamped": solved.clamped or None,
        "unconverged": solved.unconverged or None,
        "retreats": solved.retreats or None,
        "tokens": tokens,
        "seconds": seconds,
    }
