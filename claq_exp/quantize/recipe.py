"""The strategies that together quantize a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from claq_exp.errors import ConfigError
from claq_exp.quantize.codebook import Codebook
from claq_exp.quantize.layout import COLUMN_CODEBOOKS, ROW_GRID, WeightLayout
from claq_exp.quantize.precision import Precision
from claq_exp.quantize.problem import LinearProblem, relative_output_error
from claq_exp.quantize.quantized import QuantizedWeight
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
        bits, reserved = self.plan(constant_statistics(8, 64))
        if not self.codebook.mixed_widths and len(bits.unique()) > 1:
            raise ConfigError(
                "this codebook needs one width for all columns; use precision=fixed, or "
                "codebook=kmeans"
            )
        if not self.codebook.reserves and int(reserved.sum()):
            raise ConfigError(
                "this codebook cannot leave entries out; use reservation=none, or codebook=kmeans"
            )

    def plan(self, statistics: ColumnStatistics) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (column_bits [in] uint8, reserved_counts [in] int64)."""
        return self.precision.plan(statistics), self.reservation.plan(statistics)


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
    """Quantize one matrix; `system` is what the recipe's solver prepared from the problem's
    Hessian.
    """
    statistics = ColumnStatistics(problem.weight, system.distortion_weight)
    column_bits, reserved_counts = recipe.plan(statistics)
    quantizer = recipe.codebook.start(problem.weight, column_bits)
    quantized = quantize_columns(problem.weight, system, quantizer, column_bits, reserved_counts)
    dequantized = quantized.dequantize()
    norm = problem.weight.square().sum().item()
    return Solved(
        quantized=quantized,
        output_error=relative_output_error(problem, dequantized),
        weight_error=(problem.weight - dequantized).square().sum().item() / norm
        if norm > 0
        else 0.0,
        damping=system.damping,
        dead_columns=system.dead,
    )


def planned_layout(recipe: Recipe, rows: int, columns: int) -> WeightLayout:
    """Return the layout that a matrix of this shape will have; exact where plans depend on shapes
    alone.
    """
    statistics = constant_statistics(rows, columns)
    bits, reserved = recipe.plan(statistics)
    widths, counts = torch.unique(bits, return_counts=True)
    group_size = getattr(recipe.codebook, "group_size", None)
    return WeightLayout(
        kind=COLUMN_CODEBOOKS if group_size is None else ROW_GRID,
        rows=rows,
        columns=columns,
        columns_per_width=dict(zip(widths.tolist(), counts.tolist(), strict=True)),
        group_size=0 if group_size is None else min(group_size or columns, columns),
        reserved=int(reserved.sum()),
        most_reserved=int(reserved.max()),
    )


def constant_statistics(rows: int, columns: int) -> ColumnStatistics:
    """Return the statistics of a matrix of ones, for plans before any weight is read."""
    return ColumnStatistics(torch.ones(1, 1).expand(rows, columns), torch.ones(columns))
