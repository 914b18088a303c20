"""The strategies that together quantize a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import Codebook
from claq_exp.quantize.layout import MAX_BITS, WeightLayout
from claq_exp.quantize.precision import Precision
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.quantized import QuantizedWeight, layout_of
from claq_exp.quantize.reservation import Reservation
from claq_exp.quantize.solver import Solver
from claq_exp.quantize.solver.columns import ColumnSystem, quantize_columns
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Recipe:
    """One strategy of each family."""

    codebook: Codebook
    precision: Precision
    reservation: Reservation
    solver: Solver

    def __post_init__(self) -> None:
        """Refuse strategies that do not go together, by trying their plans on a small matrix."""
        plan = self.plan(constant_statistics(512, 512))
        if not self.codebook.mixed_widths and len(plan.column_bits.unique()) > 1:
            raise ConfigError(
                "this codebook needs one width for all columns; use precision=fixed, or "
                "codebook=kmeans"
            )
        if not self.codebook.reserves and int(plan.reserved_counts.sum()):
            raise ConfigError(
                "this codebook cannot leave entries out; use reservation=none, or codebook=kmeans"
            )

    def plan(self, statistics: ColumnStatistics) -> ColumnPlan:
        """Decide the widths and reservations of a matrix.

        Raises ConfigError for a strategy whose plan is no plan: those of users come through here.
        """
        rows, columns = statistics.shape
        bits, reserved = self.precision.plan(statistics), self.reservation.plan(statistics)
        _check_plan(self.precision, bits, torch.uint8, columns, (1, MAX_BITS))
        _check_plan(self.reservation, reserved, torch.int64, columns, (0, rows))
        return ColumnPlan(bits, reserved, getattr(self.reservation, "select", "magnitude"))


@dataclass(frozen=True)
class Solved:
    """A quantized matrix and how well it went.

    output_error: tr(D H D^T) / tr(W H W^T) on the calibration inputs.  weight_error: |D|^2 / |W|^2.
    """

    quantized: QuantizedWeight
    output_error: float
    weight_error: float
    damping: float | None
    dead_columns: int


def quantize_weight(
    problem: LinearProblem, system: ColumnSystem, recipe: Recipe, plan: MatrixPlan | None = None
) -> Solved:
    """Quantize one matrix.

    system: what the recipe's solver prepared from the problem's Hessian.
    plan: what was decided of the matrix before; None to decide it here, from the recipe.
    Raises NumericalError when a level or reserved value does not fit float16.
    """
    weight = problem.weight
    statistics = ColumnStatistics(
        weight, system.distortion_weight, plan.row_weights if plan else None
    )
    if plan is None:
        plan = MatrixPlan(recipe.codebook, recipe.plan(statistics))
    quantizer = plan.codebook.start(statistics, plan.columns)
    loss = quantize_columns(weight, system, quantizer)
    quantized = QuantizedWeight(
        quantizer.codes(), plan.columns.column_bits, quantizer.levels(), quantizer.reserved()
    )
    if not quantized.levels.finite():
        raise NumericalError(
            f"weights up to {weight.abs().max().item():.3g} need levels beyond float16 (65504); "
            "rescale the model's weights"
        )
    difference = weight - quantized.dequantize()
    norm = weight.square().sum().item()
    return Solved(
        quantized=quantized,
        output_error=_relative_output_error(problem, system, loss, difference),
        weight_error=difference.square().sum().item() / norm if norm > 0 else 0.0,
        damping=system.damping,
        dead_columns=int(system.dead.sum()),
    )


def _relative_output_error(
    problem: LinearProblem, system: ColumnSystem, loss: float, difference: Tensor
) -> float:
    """Return tr(D H D^T) / tr(W H W^T) with D = `difference`, [out, in]; 0.0 for a silent layer.

    loss: what `quantize_columns` returned, the same with the damped Hessian under compensation:
    what was added to the diagonal is taken off (dead columns are not in it).
    """
    hessian = problem.hessian.float()
    whole = (problem.weight @ hessian).mul_(problem.weight).sum().item()
    if system.inverse_factor is None:
        wrong = (difference @ hessian).mul_(difference).sum().item()
    else:
        squares = difference.square().sum(dim=0, dtype=torch.float64)
        wrong = loss - float((squares * system.added)[~system.dead].sum())
    return max(wrong, 0.0) / whole if whole > 0 else 0.0


def planned_layout(recipe: Recipe, rows: int, columns: int) -> WeightLayout:
    """Return the layout of a matrix of this shape; exact where plans depend on shapes alone."""
    plan = recipe.plan(constant_statistics(rows, columns))
    form = recipe.codebook.form(columns)
    return layout_of(rows, plan.column_bits, form, plan.reserved_counts)


def _check_plan(
    strategy: object, plan: torch.Tensor, dtype: torch.dtype, columns: int, limits: tuple[int, int]
) -> None:
    low, high = limits
    if plan.dtype != dtype or plan.shape != (columns,) or plan.min() < low or plan.max() > high:
        raise ConfigError(
            f"{type(strategy).__name__}.plan gave {plan.dtype} {tuple(plan.shape)} from "
            f"{plan.min()} to {plan.max()}; it must give {dtype} ({columns},) from {low} to {high}"
        )


def constant_statistics(rows: int, columns: int) -> ColumnStatistics:
    """Return the statistics of a matrix of ones, for plans before any weight is read."""
    return ColumnStatistics(torch.ones(1, 1).expand(rows, columns), torch.ones(columns))
