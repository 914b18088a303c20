"""The strategies that together quantize a matrix."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from claq_exp.errors import ConfigError, NumericalError, one_of
from claq_exp.quantize.codebook import Codebook
from claq_exp.quantize.layout import MAX_BITS, WeightLayout
from claq_exp.quantize.precision import Precision
from claq_exp.quantize.problem import LinearProblem, relative_output_error
from claq_exp.quantize.quantized import QuantizedWeight, layout_of
from claq_exp.quantize.reservation import Reservation
from claq_exp.quantize.reservation.shares import MAGNITUDE, SELECTIONS
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
        if self.select not in SELECTIONS:
            raise ConfigError(one_of("reservation's select", self.select, SELECTIONS))
        bits, reserved = self.plan(constant_statistics(512, 512))
        if not self.codebook.mixed_widths and len(bits.unique()) > 1:
            raise ConfigError(
                "this codebook needs one width for all columns; use precision=fixed, or "
                "codebook=kmeans"
            )
        if not self.codebook.reserves and int(reserved.sum()):
            raise ConfigError(
                "this codebook cannot leave entries out; use reservation=none, or codebook=kmeans"
            )

    @property
    def select(self) -> str:
        """Return the rule by which the entries of a column are picked that stay in 16 bits."""
        return getattr(self.reservation, "select", MAGNITUDE)

    def plan_key(self, name: str) -> tuple[Hashable, ...]:
        """Return what the layout of a layer depends on besides its shape."""
        families = (self.precision, self.reservation)
        return tuple(getattr(rule, "plan_key", lambda _name: None)(name) for rule in families)

    def plan(self, statistics: ColumnStatistics) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (column_bits [in] uint8, reserved_counts [in] int64).

        Raises ConfigError for a strategy whose plan is no plan: those of users come through here.
        """
        rows, columns = statistics.shape
        bits, reserved = self.precision.plan(statistics), self.reservation.plan(statistics)
        _check_plan(self.precision, bits, torch.uint8, columns, (1, MAX_BITS))
        _check_plan(self.reservation, reserved, torch.int64, columns, (0, rows))
        return bits, reserved


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


def quantize_weight(problem: LinearProblem, system: ColumnSystem, recipe: Recipe) -> Solved:
    """Quantize one matrix.

    system: what the recipe's solver prepared from the problem's Hessian.
    Raises NumericalError when a level or reserved value does not fit float16.
    """
    weight = problem.weight
    statistics = ColumnStatistics(weight, system.distortion_weight, system.order, problem.name)
    column_bits, reserved_counts = recipe.plan(statistics)
    quantizer = recipe.codebook.start(weight, column_bits)
    quantized = quantize_columns(
        weight, system, quantizer, column_bits, reserved_counts, select=recipe.select
    )
    if not quantized.levels.finite():
        raise NumericalError(
            f"weights up to {weight.abs().max().item():.3g} need levels beyond float16 (65504); "
            "rescale the model's weights"
        )
    dequantized = quantized.dequantize()
    norm = weight.square().sum().item()
    error = (weight - dequantized).square().sum().item()
    return Solved(
        quantized=quantized,
        output_error=relative_output_error(problem, dequantized),
        weight_error=error / norm if norm > 0 else 0.0,
        damping=system.damping,
        dead_columns=system.dead,
    )


def planned_layout(recipe: Recipe, rows: int, columns: int, name: str = "") -> WeightLayout:
    """Return the layout of a layer; exact where plans depend on shapes and names alone."""
    statistics = constant_statistics(rows, columns, name)
    column_bits, reserved_counts = recipe.plan(statistics)
    levels = recipe.codebook.start(statistics.weight, column_bits).levels()
    return layout_of(rows, column_bits, levels, reserved_counts)


def _check_plan(
    strategy: object, plan: torch.Tensor, dtype: torch.dtype, columns: int, limits: tuple[int, int]
) -> None:
    low, high = limits
    if plan.dtype != dtype or plan.shape != (columns,) or plan.min() < low or plan.max() > high:
        raise ConfigError(
            f"{type(strategy).__name__}.plan gave {plan.dtype} {tuple(plan.shape)} from "
            f"{plan.min()} to {plan.max()}; it must give {dtype} ({columns},) from {low} to {high}"
        )


def constant_statistics(rows: int, columns: int, name: str = "") -> ColumnStatistics:
    """Return the statistics of a matrix of ones, for plans before any weight is read."""
    ones = torch.ones(1, 1).expand(rows, columns)
    return ColumnStatistics(ones, torch.ones(columns), torch.arange(columns), name)
