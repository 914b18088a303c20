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
from claq_exp.quantize.solver.columns import (
    ColumnSystem,
    GroupedSystem,
    parts_of,
    quantize_columns,
)
from claq_exp.quantize.solver.compiled import (
    closer,
    compensate,
    descend_block,
    descend_block_of_groups,
)
from claq_exp.quantize.solver.gptq import Gptq
from claq_exp.quantize.symmetric import bands, permute_, product

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
    system: a `DescentSystem`, or one of them for each group of rows.
    coded: [in, out] float32, the columns that it was given.
    importance: [out] float32, of the rows, for the codebooks and what counts as nearer.
    found: [in, out] float32, the columns as they are stored.
    """

    def __init__(
        self,
        weight: Tensor,
        system: Any,
        quantizer: ColumnQuantizer,
        coded: Tensor,
        importance: Tensor,
    ) -> None:
        self.system, self.quantizer, self._coded = system, quantizer, coded
        order = system.order
        self.found = quantizer.payload().dequantize().t().index_select(0, order)
        self._missed = self.found - weight.t().index_select(0, order)
        self.importance = importance
        self._parts: list[tuple[DescentSystem, slice]] = parts_of(system, len(weight))  # type: ignore[assignment]
        self._wanted = [
            None if part.lost is None else product(part.lost.t(), weight[rows].t(), wide=part.wide)
            for part, rows in self._parts
        ]

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
        weights, gained = self.importance.numpy(), 0.0
        for block in bands(len(self.found), self._parts[0][0].block_size):
            slope, ratios, prices = self.slope(block), [], []
            moved = torch.empty_like(slope)
            for part, rows in self._parts:
                price = part.hessian.diagonal()[block]
                best = self.found[block, rows], slope[:, rows], price[:, None]
                exact = map(Tensor.double, best) if part.wide else best
                moved[:, rows] = torch.addcdiv(*exact, value=-1)
                ratios.append(part.hessian[block, block] / price[:, None])
                prices.append(price)
            gained += _descend(
                self.quantizer,
                self.system.order[block].numpy(),
                moved.numpy(),
                torch.stack(ratios).numpy(),
                torch.stack(prices).numpy(),
                self.found[block].numpy(),
                self._coded[block].numpy(),
                weights,
            )
            self._missed[block] += moved
        return gained

    def slope(self, columns: slice) -> Tensor:
        """Return half of how the loss grows with the stored values of some columns: [some, out]."""
        slope = torch.empty_like(self.found[columns])
        for (part, rows), wanted in zip(self._parts, self._wanted, strict=True):
            missed = self._missed[:, rows]
            slope[:, rows] = product(part.hessian[columns], missed, wide=part.wide)
            if wanted is not None:
                slope[:, rows] -= wanted[columns]
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
        total = 0.0
        for part, rows in self._parts:
            missed = self._missed[:, rows].clone()
            missed[part.dead[part.order]] = 0.0
            for block in bands(len(missed), part.block_size):
                grown = product(part.hessian[block], missed, wide=part.wide)
                total += float(grown.mul_(missed[block]).sum(dtype=torch.float64))
        return total


def _without_compensation(system: Any) -> Any:
    """Return a system, or one of groups, whose column loop rounds to nearest."""
    if isinstance(system, GroupedSystem):
        return replace(system, parts=tuple(map(_without_compensation, system.parts)))
    return replace(system, inverse_factor=None, correction=None)


def _descend(
    quantizer: ColumnQuantizer,
    columns: NDArray[np.int64],
    values: NDArray[np.float32],
    ratios: NDArray[np.float32],
    prices: NDArray[np.float32],
    found: NDArray[np.float32],
    coded: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> float:
    """Code the columns of a block again: `descend_block`, in Python where a codebook is.

    ratios: [groups, block, block], of each group of rows.  prices: [groups, block], its H_pp.
    Returns by how much the loss fell.
    """
    task = quantizer.compiled()
    if task is not None and len(ratios) == 1:
        gains = descend_block(values, ratios[0], columns, task, found, coded, weights)
        return float(gains @ prices[0].astype(np.float64))
    if task is not None:
        return float(
            descend_block_of_groups(
                values, ratios, prices, columns, task, found, coded, weights
            ).sum()
        )
    gained = 0.0
    groups = np.split(values, len(ratios), axis=1)
    each = len(weights) // len(ratios)
    for position, column in enumerate(columns.tolist()):
        for own, ratio in zip(groups, ratios, strict=True):
            compensate(own, ratio, position)
        current, kept = values[position], found[position]
        stored = quantizer.code_column(column, current)
        gain = closer(current, kept, stored, weights * np.repeat(prices[:, position], each))
        if gain >= 0:
            gained, coded[position] = gained + gain, current
        else:
            stored = quantizer.code_column(column, coded[position])
        current[:] = stored - kept
        kept[:] = stored
    return gained
