"""The strategies that together quantize a matrix."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, one_of
from claq_exp.payload.base import Layout
from claq_exp.payload.stored import MAX_BITS
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import Codebook
from claq_exp.quantize.moments import WANTED
from claq_exp.quantize.precision import NoPrecision, Precision
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.reservation import Reservation
from claq_exp.quantize.reservation.base import Planned
from claq_exp.quantize.reservation.shares import SELECTIONS
from claq_exp.quantize.solver import Nearest, Solver
from claq_exp.quantize.solver.base import Prepared, Solved
from claq_exp.quantize.statistics import ColumnStatistics, EqualColumns
from claq_exp.quantize.strategy import check_members

PROTOCOLS = {
    "codebook": Codebook,
    "precision": Precision,
    "reservation": Reservation,
    "solver": Solver,
}


@dataclass(frozen=True)
class Recipe:
    """One strategy of each family."""

    codebook: Codebook
    precision: Precision
    reservation: Reservation
    solver: Solver

    def __post_init__(self) -> None:
        """Refuse strategies that do not go together, by trying their plans on a small matrix."""
        for family, protocol in PROTOCOLS.items():
            check_members(family, getattr(self, family), protocol)
        if unknown := sorted(self.solver.wants - set(WANTED)):
            raise ConfigError(one_of("solver's wants", unknown[0], WANTED))
        if self.solver.fits_levels and not self.codebook.free_levels:
            raise ConfigError(
                f"solver {type(self.solver).__name__} fits the levels of tables, and those of "
                "this codebook are not free: they are shared, lie on a grid or follow a rule; use "
                "codebook=kmeans or codebook=row_kmeans, or solver=quantease"
            )
        if self.solver.holds_levels and not self.codebook.holds_levels:
            name = type(self.codebook).__name__
            raise ConfigError(
                f"solver.refit=false keeps the levels of the start, and codebook {name} fits them "
                "whenever it codes a column; use solver.refit=true"
            )
        self._check_thresholding()
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
        self.codebook.check(int(plan.column_bits.max()))
        if not self.codebook.reserves and int(plan.reserved_counts.sum()):
            raise ConfigError(
                "this codebook cannot leave entries out; use reservation=none, or codebook=kmeans"
            )

    def _check_thresholding(self) -> None:
        """Refuse a solver and a codebook that cannot move reserved entries, if these must move."""
        thresholding = self.reservation.thresholding
        if thresholding is None:
            return
        if not self.solver.moves_reserved:
            raise ConfigError(
                f"reservation=iht chooses entries while the matrix is solved, and solver "
                f"{type(self.solver).__name__} cannot; use solver=quantease, or reservation=hessian"
            )
        if self.codebook.reserves and not self.codebook.holds_levels:
            raise ConfigError(
                f"reservation=iht needs a codebook that can hold its levels, and codebook "
                f"{type(self.codebook).__name__} cannot; use codebook=kmeans"
            )
        if thresholding.whole_columns and self.solver.holds_levels:
            raise ConfigError(
                "reservation.whole_columns=true needs levels that are fitted again, for a column "
                "that is reserved at first has none; use solver.refit=true"
            )

    def nearest(self) -> Recipe:
        """Return the recipe that codes each column for itself, with what is reserved at first."""
        return replace(self, solver=Nearest(), reservation=Planned(self.reservation))

    @property
    def select(self) -> str:
        """Return the rule by which the entries of a column are picked that stay in 16 bits."""
        return self.reservation.select

    @property
    def allocated(self) -> bool:
        """Whether the widths are decided over the whole model, and given with each matrix."""
        return self.precision == NoPrecision()

    def plan_key(self, name: str) -> tuple[Hashable, ...]:
        """Return what the layout of a layer depends on besides its shape."""
        return self.precision.plan_key(name), self.reservation.plan_key(name)

    def plan(self, statistics: ColumnStatistics) -> ColumnPlan:
        """Decide the widths and reservations of a matrix.

        Raises ConfigError for a strategy whose plan is no plan: those of users come through here.
        """
        rows, columns = statistics.shape
        bits, reserved = self.precision.plan(statistics), self.reservation.plan(statistics)
        _check_plan(self.precision, bits, torch.uint8, columns, (1, MAX_BITS))
        _check_plan(self.reservation, reserved, torch.int64, columns, (0, rows))
        return ColumnPlan(bits, reserved, self.select, self.reservation.thresholding)


def quantize_weight(
    problem: LinearProblem, prepared: Prepared, recipe: Recipe, plan: MatrixPlan | None = None
) -> Solved:
    """Quantize one matrix on the CPU.

    prepared: what the recipe's solver prepared from the moments of the matrix's inputs.
    plan: what was decided of the matrix before; None to decide it here, from the recipe.
    Raises NumericalError when a level or reserved value does not fit float16.
    """
    return recipe.solver.solve(problem, prepared, decide(problem, prepared, recipe, plan))


def decide(
    problem: LinearProblem, prepared: Prepared, recipe: Recipe, plan: MatrixPlan | None
) -> MatrixPlan:
    """Return the plan of a matrix: the one given, or the recipe's.  prepared: on the CPU."""
    if plan is not None:
        return plan
    return MatrixPlan(recipe.codebook, recipe.plan(prepared.statistics(problem)))


def planned_layout(recipe: Recipe, rows: int, columns: int, name: str = "") -> Layout:
    """Return the layout of a layer; exact where plans depend on shapes and names alone."""
    plan = recipe.plan(EqualColumns(rows, columns, name))
    return recipe.codebook.layout(rows, plan)


def planned_layouts(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Layout]:
    """Return the layout of each layer, name -> (out, in): one of each kind stands for all."""
    planned: dict[Hashable, Layout] = {}
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
