"""The strategies that together quantize a matrix."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, NumericalError, one_of
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import Codebook
from claq_exp.quantize.codebook.block_formats import BlockCodebook
from claq_exp.quantize.layout import MAX_BITS, WeightLayout
from claq_exp.quantize.precision import NoPrecision, Precision
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.quantized import QuantizedWeight, layout_of
from claq_exp.quantize.reservation import Reservation
from claq_exp.quantize.reservation.shares import MAGNITUDE, SELECTIONS
from claq_exp.quantize.solver import Solver
from claq_exp.quantize.solver.columns import ColumnSystem, quantize_columns
from claq_exp.quantize.statistics import ColumnStatistics, EqualColumns
from claq_exp.quantize.symmetric import bands


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
        if self.allocated:
            return
        plan = self.plan(EqualColumns(512, 512))
        if not self.codebook.mixed_widths and len(plan.column_bits.unique()) > 1:
            raise ConfigError(
                "this codebook needs one width for all columns; use precision=fixed, or "
                "codebook=kmeans"
            )
        if isinstance(self.codebook, BlockCodebook):
            self.codebook.check(int(plan.column_bits[0]))
        if not self.codebook.reserves and int(plan.reserved_counts.sum()):
            raise ConfigError(
                "this codebook cannot leave entries out; use reservation=none, or codebook=kmeans"
            )

    @property
    def select(self) -> str:
        """Return the rule by which the entries of a column are picked that stay in 16 bits."""
        return getattr(self.reservation, "select", MAGNITUDE)

    @property
    def allocated(self) -> bool:
        """Whether the widths are decided over the whole model, and given with each matrix."""
        return self.precision == NoPrecision()

    def plan_key(self, name: str) -> tuple[Hashable, ...]:
        """Return what the layout of a layer depends on besides its shape."""
        families = (self.precision, self.reservation)
        return tuple(getattr(rule, "plan_key", lambda _name: None)(name) for rule in families)

    def plan(self, statistics: ColumnStatistics) -> ColumnPlan:
        """Decide the widths and reservations of a matrix.

        Raises ConfigError for a strategy whose plan is no plan: those of users come through here.
        """
        rows, columns = statistics.shape
        bits, reserved = self.precision.plan(statistics), self.reservation.plan(statistics)
        _check_plan(self.precision, bits, torch.uint8, columns, (1, MAX_BITS))
        _check_plan(self.reservation, reserved, torch.int64, columns, (0, rows))
        return ColumnPlan(bits, reserved, self.select)


@dataclass(frozen=True)
class Solved:
    """A quantized matrix, how well it went, and what went otherwise than asked.

    output_error: tr(D H D^T) / tr(W H W^T) on the calibration inputs.  weight_error: |D|^2 / |W|^2.
    damping: of the solver; raised: it had to be larger than asked.
    dead_columns: inputs that were zero on every token.
    nearest: why all columns were rounded to nearest, see ColumnSystem.
    clamped: weights that their level puts beyond float16, and that are cut to its range.
    unconverged: columns whose clustering stopped at its limit of passes.
    retreats: how often memory was short, and the work went on in smaller parts or on the CPU.
    """

    quantized: QuantizedWeight
    output_error: float
    weight_error: float
    damping: float | None
    dead_columns: int
    raised: bool = False
    nearest: str = ""
    clamped: int = 0
    unconverged: int = 0
    retreats: int = 0


def quantize_weight(
    problem: LinearProblem, system: ColumnSystem, recipe: Recipe, plan: MatrixPlan | None = None
) -> Solved:
    """Quantize one matrix.

    system: what the recipe's solver prepared from the problem's Hessian.
    plan: what was decided of the matrix before; None to decide it here, from the recipe.
    Raises NumericalError when a level or reserved value does not fit float16.
    """
    statistics, plan = decide(problem, system, recipe, plan)
    quantizer = plan.codebook.start(statistics, plan.columns)
    loss = quantize_columns(problem.weight, system, quantizer)
    quantized = QuantizedWeight(
        quantizer.codes(), plan.columns.column_bits, quantizer.levels(), quantizer.reserved()
    )
    solved = describe(problem, system, quantized, loss)
    return replace(solved, unconverged=getattr(quantizer, "unconverged", 0))


def decide(
    problem: LinearProblem, system: ColumnSystem, recipe: Recipe, plan: MatrixPlan | None
) -> tuple[ColumnStatistics, MatrixPlan]:
    """Return the statistics of a matrix, and its plan: the one given, or the recipe's."""
    statistics = ColumnStatistics(
        problem.weight,
        system.distortion_weight,
        system.order,
        problem.name,
        plan.row_weights if plan else None,
    )
    return statistics, plan or MatrixPlan(recipe.codebook, recipe.plan(statistics))


def describe(
    problem: LinearProblem,
    system: ColumnSystem,
    quantized: QuantizedWeight,
    loss: float | None = None,
) -> Solved:
    """Measure how well a matrix was quantized.

    loss: tr(D H D^T) of the damped Hessian where it is known, see `quantize_columns`.
    Raises NumericalError when a level does not fit float16.
    """
    weight = problem.weight
    if not quantized.levels.finite():
        raise NumericalError(
            f"weights up to {weight.abs().max().item():.3g} need levels beyond float16 (65504); "
            "rescale the model's weights"
        )
    difference = quantized.dequantize().sub_(weight)
    squares, norm = _column_squares(difference), float(_column_squares(weight).sum())
    if loss is None or system.inverse_factor is None:
        wrong = problem.error(difference)
    else:  # what was added to the diagonal is taken off; dead columns are not in it
        wrong = loss - float((squares * system.added)[~system.dead].sum())
    whole = problem.energy()
    return Solved(
        quantized=quantized,
        output_error=max(wrong, 0.0) / whole if whole > 0 else 0.0,
        weight_error=float(squares.sum()) / norm if norm > 0 else 0.0,
        damping=system.damping,
        dead_columns=int(system.dead.sum()),
        raised=system.raised,
        nearest=system.nearest,
        clamped=quantized.clamped(),
    )


def _column_squares(matrix: Tensor) -> Tensor:
    """Return the sum of squares of each column, in float64 and without a second matrix."""
    squares = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for band in bands(len(matrix)):
        squares += matrix[band].square().sum(dim=0, dtype=torch.float64)
    return squares


def planned_layout(recipe: Recipe, rows: int, columns: int, name: str = "") -> WeightLayout:
    """Return the layout of a layer; exact where plans depend on shapes and names alone."""
    plan = recipe.plan(EqualColumns(rows, columns, name))
    form = recipe.codebook.form(columns)
    return layout_of(rows, plan.column_bits, form, plan.reserved_counts)


def planned_layouts(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, WeightLayout]:
    """Return the layout of each layer, name -> (out, in): one of each kind stands for all."""
    planned: dict[Hashable, WeightLayout] = {}
    layouts = {}
    for name, (rows, columns) in shapes.items():
        kind = (rows, columns, recipe.plan_key(name))
        if kind not in planned:
            planned[kind] = planned_layout(recipe, rows, columns, name)
        layouts[name] = planned[kind]
    return layouts


def _check_plan(
    strategy: object, plan: Tensor, dtype: torch.dtype, columns: int, limits: tuple[int, int]
) -> None:
    low, high = limits
    if plan.dtype != dtype or plan.shape != (columns,) or plan.min() < low or plan.max() > high:
        raise ConfigError(
            f"{type(strategy).__name__}.plan gave {plan.dtype} {tuple(plan.shape)} from "
            f"{plan.min()} to {plan.max()}; it must give {dtype} ({columns},) from {low} to {high}"
        )
