"""Slow float64 references, written from the papers' formulas and not from the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook import Codebook, ColumnQuantizer, KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.quantize.solver.base import Solved
from claq_exp.quantize.statistics import ColumnStatistics

ColumnRule = Callable[[int, np.ndarray], np.ndarray]


def random_problem(
    rows: int, columns: int, seed: int, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """A weight matrix and a Hessian of correlated inputs: ([out, in] float32, [in, in] float64)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    shape = (tokens or 8 * columns, columns)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64) @ mixing
    return weight, 2 / len(inputs) * inputs.t() @ inputs


def recipe(**changes: object) -> Recipe:
    """3-bit k-means under GPTQ, with the given strategies in place of these."""
    plain = {
        "codebook": KMeans(),
        "precision": Fixed(bits=3),
        "reservation": NoReservation(),
        "solver": Gptq(),
    }
    return Recipe(**{**plain, **changes})


def solve(weight: Tensor, hessian: Tensor, chosen: Recipe) -> Solved:
    """Quantize one matrix as the package does it for a layer."""
    problem = LinearProblem(weight, hessian)
    return quantize_weight(problem, chosen.solver.prepare(Moments(hessian)), chosen)


def damped(hessian: Tensor, damping: float) -> np.ndarray:
    """H + damping * mean(diag H) * I."""
    matrix = hessian.double().numpy()
    return matrix + damping * np.diag(matrix).mean() * np.eye(len(matrix))


def explicit_obs(
    weight: Tensor, hessian: np.ndarray, order: Iterable[int], quantize: ColumnRule
) -> tuple[np.ndarray, np.ndarray]:
    """Optimal brain surgeon, one column at a time, inverting what is left of H at every step.

    With F the columns left and q the first of them, every column k of F becomes
    w_k - (w_q - quant(w_q)) / [H_F^-1]_qq * [H_F^-1]_qk (GPTQ, arXiv 2210.17323, eq. 2).
    Returns (quantized, compensated), both [out, in]: a compensated column is what was quantized.
    """
    work = weight.double().numpy().copy()
    quantized, compensated = np.zeros_like(work), np.zeros_like(work)
    left = list(order)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        column = left[0]
        compensated[:, column] = work[:, column]
        quantized[:, column] = quantize(column, work[:, column])
        error = (work[:, column] - quantized[:, column]) / inverse[0, 0]
        work[:, left] -= np.outer(error, inverse[0])
        left.pop(0)
    return quantized, compensated


@dataclass(frozen=True)
class Led(Codebook):
    """A codebook that is led along a reference: each column starts from the reference's state.

    Fits are chaotic: a last bit of one column may tip a clustering, and every column after it.
    Here no column sees another's rounding: what the package compensated is held against the
    reference's column, and the codebook's own step then quantizes the reference's, in float32.

    codebook: the one under test.  compensated: [out, in] float64, of the reference.
    """

    codebook: Codebook
    compensated: np.ndarray

    @property
    def mixed_widths(self) -> bool:
        return self.codebook.mixed_widths

    @property
    def reserves(self) -> bool:
        return self.codebook.reserves

    def layout(self, rows: int, plan: ColumnPlan) -> object:
        return self.codebook.layout(rows, plan)

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> LedColumns:
        return LedColumns(self.codebook.start(statistics, plan), self.compensated)


class LedColumns(ColumnQuantizer):
    """The quantizer of a matrix, led."""

    def __init__(self, own: ColumnQuantizer, compensated: np.ndarray) -> None:
        self._own, self._compensated = own, compensated
        self.payload = own.payload

    def code_column(self, column: int, values: np.ndarray) -> np.ndarray:
        expected = self._compensated[:, column]
        size = np.abs(expected).max()
        assert values == pytest.approx(expected, abs=1e-4 * size, rel=0)
        values[:] = expected  # the loop's own: the error is that of the reference's column
        return self._own.code_column(column, values)


def fitted(
    fit: Callable, values: np.ndarray, entries: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """The centroids that a compiled fit writes: [entries] float64."""
    centroids = np.full(entries, np.nan)
    given = np.ones(len(values), dtype=np.float32) if weights is None else weights
    fit(values, given, centroids)
    return centroids


def squared_error(
    values: np.ndarray, levels: np.ndarray, weights: np.ndarray | float = 1.0
) -> float:
    """Weighted squared distance of every value to its nearest level, summed in float64."""
    distance = values.astype(np.float64)[:, None] - np.asarray(levels, np.float64)[None, :]
    return float((weights * (distance**2).min(axis=1)).sum())


def best_error(values: np.ndarray, entries: int, weights: np.ndarray | None = None) -> float:
    """The least weighted error of any partition into `entries` intervals."""
    mass = np.ones(len(values)) if weights is None else weights.astype(np.float64)
    order = np.argsort(values[mass > 0], kind="stable")
    values, mass = values[mass > 0][order].astype(np.float64), mass[mass > 0][order]
    if len(values) <= entries:
        return 0.0

    def cost(first: int, last: int) -> float:
        cell, share = values[first:last], mass[first:last]
        return float((share * (cell - np.average(cell, weights=share)) ** 2).sum())

    best = np.inf
    for cuts in combinations(range(1, len(values)), entries - 1):
        borders = (0, *cuts, len(values))
        best = min(best, sum(cost(a, b) for a, b in pairwise(borders)))
    return best
