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
from claq_exp.quantize.device import solve_on_device
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, Solved, quantize_weight
from claq_exp.quantize.solver import Nearest, Solver
from claq_exp.quantize.solver.columns import ColumnSystem

CPU = torch.device("cpu")


def solve_hessian(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    recipe: Recipe,
    plans: Mapping[str, MatrixPlan] | None = None,
    device: torch.device = CPU,
    *,
    strict: bool = False,
) -> list[tuple[Solved, float]]:
    """Quantize the linears that share an input; return (solution, seconds) of each.

    A Hessian that no damping makes positive definite has its linears rounded to nearest; `strict`
    refuses it.

    weights: full name -> [out, in] float32 on the CPU.
    hessian: [in, in] float64 on the CPU, of their input.  It is used up: where nothing needs it
        during the column loop its memory is given back before.
    plans, device: as in `solve_group`.
    Raises NumericalError that names a layer.
    """
    retreats = 0
    problems = [LinearProblem(weight, hessian, name) for name, weight in weights.items()]
    energies = [problem.energy() for problem in problems]
    try:
        system = _prepare(recipe.solver, hessian, device, problems[0].name, strict)
    except torch.OutOfMemoryError:
        device, retreats = CPU, 1
        system = _prepare(recipe.solver, hessian, device, problems[0].name, strict)
    told = device == CPU and system.inverse_factor is not None  # the loop will find the errors
    problems = [
        replace(problem, hessian=None if told else hessian, known_energy=energy)
        for problem, energy in zip(problems, energies, strict=True)
    ]
    if told:
        hessian.data = hessian.new_empty(0)  # the caller may hold the tensor still
    solutions = solve_group(problems, system, recipe, plans, device)
    return [
        (replace(solved, retreats=solved.retreats + retreats), seconds)
        for solved, seconds in solutions
    ]


def _prepare(
    solver: Solver, hessian: Tensor, device: torch.device, name: str, strict: bool
) -> ColumnSystem:
    try:
        return solver.prepare(hessian.to(device), overwrite=True)
    except NumericalError as error:
        if strict:
            raise NumericalError(f"{name}: strict=true, and {error}") from error
        return replace(Nearest().prepare(hessian), nearest="indefinite")


def solve_group(
    problems: list[LinearProblem],
    system: ColumnSystem,
    recipe: Recipe,
    plans: Mapping[str, MatrixPlan] | None = None,
    device: torch.device = CPU,
) -> list[tuple[Solved, float]]:
    """Solve matrices that share their input side by side; return (solution, seconds) of each.

    plans: what was decided before of the matrices of these names.  device: where to solve, if the
    recipe can be solved there; the CPU takes what a GPU cannot, and what it has no memory for.
    """
    plans, retreats = plans or {}, 0
    if device != CPU:
        started = time.perf_counter()
        try:
            together = solve_on_device(problems, system, recipe, plans, device)
        except torch.OutOfMemoryError:
            together, retreats = None, 1
        if together is not None:
            each = (time.perf_counter() - started) / len(problems)
            return [(solved, each) for solved in together]
        system = system.cpu()

    def solve(problem: LinearProblem) -> tuple[Solved, float]:
        started = time.perf_counter()
        try:
            solved = quantize_weight(problem, system, recipe, plans.get(problem.name))
        except NumericalError as error:
            raise NumericalError(f"{problem.name}: {error}") from error
        return replace(solved, retreats=retreats), time.perf_counter() - started

    threads = torch.get_num_threads()
    each = max(1, threads // len(problems))
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(each,))
    try:
        with pool:
            return list(pool.map(solve, problems))
    finally:
        torch.set_num_threads(threads)


def report_row(
    index: int, name: str, solved: Solved, tokens: int, seconds: float
) -> dict[str, Any]:
    """Return the row of layers.csv of a linear; what did not happen is None.

    index: of its block.
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
