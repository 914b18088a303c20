"""Bits, codebook form and reservation of all columns of a model, chosen under one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from claq_exp.allocate.allocation import Allocation, OnShare, Shapes, Survey
from claq_exp.allocate.choices import (
    Choices,
    allocate,
    choose_variants,
    column_options,
    measure_choices,
    measure_tables,
)
from claq_exp.errors import ConfigError, one_of
from claq_exp.payload.base import Layout
from claq_exp.payload.stored import MAX_BITS
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.budget import BudgetConfig, Overhead
from claq_exp.quantize.codebook import Codebook
from claq_exp.quantize.codebook.group_table import GroupTableCodebook
from claq_exp.quantize.codebook.kmeans import KMeans
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.statistics import ColumnStatistics

COUNTS = ("linear", "nominal")
FISHER = "fisher"
IMPORTANCE = (FISHER, "output")
CODEBOOKS = ("auto", "own", "shared")
ROW_SCALES = ("auto", "always", "never")
ATTEMPTS = 8  # to fit matrices and what comes with them into a budget
SAMPLED = 16  # every so many columns decide on the form of a matrix
TABLES = (GroupTableCodebook(32, 6), GroupTableCodebook(64, 6))  # that compete, where they may
Known = KMeans | GroupTableCodebook


@dataclass(frozen=True)
class RateDistortion(Allocation):
    """Spend the budget where it lowers the loss of the whole model most.

    A survey of the original model gives the price of an error in every column (the GPTQ distortion
    weight 1 / U_jj^2) and, with `importance=fisher`, in every row; trial fits give the error at
    each width and reserved count; `claq_exp.allocate.choices` spends the bits.

    target_bits: bits per weight over all quantized matrices; never exceeded.
    count: what they count: linear, everything that is stored, or nominal, as papers print.
    importance: fisher, squared gradients of the loss, one backward pass; output, the relative
        output error of every matrix alike.
    codebooks: own, a codebook per column; shared, one per matrix and width, stretched for every
        column; auto, what is better for each matrix.
    row_scales: divide rows by their root mean square: always, never, or auto, where it is better.
    row_weights: let the importance of rows weight the k-means too (fisher only).
    tables: let tables with group scales compete with the column codebooks, matrix by matrix.  With
        codebook=group_table there are tables alone.
    reserve: outliers in 16 bits compete with code widths for the same bits.
    small, large: the shares of a column's entries that it may keep then, beside none.
    windows: calibration windows for the survey.
    """

    target_bits: float = 2.6
    count: str = "linear"
    importance: str = FISHER
    codebooks: str = "auto"
    row_scales: str = "auto"
    row_weights: bool = False
    tables: bool = False
    reserve: bool = True
    small: float = 0.0025
    large: float = 0.01
    min_bits: int = 1
    max_bits: int = MAX_BITS
    windows: int = 8

    def __post_init__(self) -> None:
        for name, known in (
            ("count", COUNTS),
            ("importance", IMPORTANCE),
            ("codebooks", CODEBOOKS),
            ("row_scales", ROW_SCALES),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(one_of(f"allocation.{name}", getattr(self, name), known))
        if not 1 <= self.min_bits <= self.max_bits <= MAX_BITS:
            raise ConfigError(
                f"allocation.min_bits={self.min_bits} and max_bits={self.max_bits}; need 1 <= "
                f"min_bits <= max_bits <= {MAX_BITS}"
            )
        if self.windows < 1:
            raise ConfigError(f"allocation.windows is {self.windows}; give a positive number")
        if not 0 < self.small < self.large <= 1:
            raise ConfigError(
                f"allocation.small={self.small} and large={self.large}; need 0 < small < large <= 1"
            )

    def check(self, recipe: Recipe) -> None:
        """Raise ConfigError for a codebook of unknown errors, or rules that decide beside this."""
        super().check(recipe)
        if recipe.reservation != NoReservation():
            raise ConfigError(
                "allocation=rate_distortion decides what is reserved too: use reservation=none"
            )
        for form in self._variants(_known(recipe.codebook)):
            form.check(self.min_bits)

    def within(self, budget: BudgetConfig) -> RateDistortion:
        """Return the rule with a budget as its target."""
        if budget.bits is None:
            return self
        return replace(self, target_bits=budget.bits, count=budget.kind)

    def planned_layouts(
        self, recipe: Recipe, shapes: Shapes, overhead: Overhead
    ) -> dict[str, Layout]:
        """Return about how each matrix will be stored, as if all its columns were alike.

        Raises ConfigError where the fewest bits of all are too many, whatever a survey will find.
        """
        codebook = _known(recipe.codebook)
        self._check_room(codebook, shapes, overhead)
        layouts = self._expected_layouts(codebook, shapes)
        if self.count == "nominal":
            return layouts
        beside = overhead(layouts) / sum(rows * columns for rows, columns in shapes.values())
        less = replace(self, target_bits=self.target_bits - beside)
        return less._expected_layouts(codebook, shapes)

    def _check_room(self, codebook: Known, shapes: Shapes, overhead: Overhead) -> None:
        smallest = {shape: self._smallest(codebook, shape) for shape in set(shapes.values())}
        stored = {s: form.layout(form.plan(form.cheapest())) for s, form in smallest.items()}
        fewest = {shape: form.least() for shape, form in smallest.items()}
        layouts = {name: stored[shape] for name, shape in shapes.items()}
        beside = 0.0 if self.count == "nominal" else overhead(layouts)
        weights = sum(rows * columns for rows, columns in shapes.values())
        least = (beside + sum(fewest[shape] for shape in shapes.values())) / weights
        if least > self.target_bits:
            raise ConfigError(
                f"a budget of {self.target_bits:.4g} {self.count} bits per weight of these "
                f"matrices cannot be met: with allocation.min_bits={self.min_bits} the fewest are "
                f"{least:.4g}"
            )

    def _smallest(self, codebook: Known, shape: tuple[int, int]) -> Choices:
        """Return what a matrix may choose in the form that can take the fewest bits."""
        forms = [self._alike(variant, shape) for variant in self._variants(codebook)]
        return min(forms, key=lambda form: form.least())

    def _expected_layouts(self, codebook: Known, shapes: Shapes) -> dict[str, Layout]:
        alike = {shape: self.expected_layout(codebook, shape) for shape in set(shapes.values())}
        return {name: alike[shape] for name, shape in shapes.items()}

    def survey(self) -> Survey:
        """Return what this rule must know of the original."""
        return Survey(self.windows, gradients=self.importance == FISHER)

    def plan_model(
        self,
        statistics: Mapping[str, ColumnStatistics],
        codebook: Codebook,
        *,
        overhead: Overhead = lambda _: 0.0,
        on_share: OnShare = lambda _share, _name: None,
    ) -> dict[str, MatrixPlan]:
        """Return a plan for every matrix of a surveyed model; see `Allocation`."""
        budget = self.target_bits * sum(s.weight.numel() for s in statistics.values())
        variants = self._variants(_known(codebook))
        names = list(statistics)
        chosen = dict.fromkeys(names, variants[0])
        known: dict[str, Choices] = {}
        if len(variants) > 1:
            samples = []
            for name in names:
                sample = torch.arange(0, statistics[name].shape[1], SAMPLED)
                samples.append([self._measure(statistics[name], v, sample) for v in variants])
                on_share(0.4 / len(names), name)
            picked = choose_variants(
                samples, [len(s.weight[0]) for s in statistics.values()], budget
            )
            chosen = {name: variants[at] for name, at in zip(names, picked, strict=True)}
            known = {name: own[at] for name, own, at in zip(names, samples, picked, strict=True)}
        choices: dict[str, Choices] = {}
        for name in names:
            found = known.get(name)
            if found is None or found.columns < statistics[name].shape[1]:  # of some columns
                found = self._measure(statistics[name], chosen[name], None)
            choices[name] = found
            on_share((0.6 if len(variants) > 1 else 1.0) / len(names), name)
        plans = self._fit(choices, budget, overhead)
        return {
            name: MatrixPlan(
                chosen[name], plan, statistics[name].row_weights if self.row_weights else None
            )
            for name, plan in plans.items()
        }

    def _fit(
        self,
        choices: Mapping[str, Choices],
        budget: float,
        overhead: Overhead,
    ) -> dict[str, ColumnPlan]:
        """Allocate until matrices and what comes with them fit the budget together."""
        beside = 0.0
        for _ in range(ATTEMPTS):
            found = allocate(list(choices.values()), budget - beside)
            plans = dict(zip(choices, found, strict=True))
            if self.count == "nominal":
                return plans
            layouts = {name: choices[name].layout(plan) for name, plan in plans.items()}
            needed = overhead(layouts)
            if sum(layout.ledger().total for layout in layouts.values()) + needed <= budget:
                return plans
            beside = max(needed, beside * (1 + 1e-3))
        raise ConfigError(
            f"allocation.target_bits={self.target_bits} leaves no room for what a checkpoint "
            "stores beside its matrices; raise it"
        )

    def expected_layout(self, codebook: Known, shape: tuple[int, int]) -> Layout:
        """Return about what a matrix will take, as if all its columns were alike."""
        if isinstance(codebook, KMeans):
            codebook = codebook.variant(
                shared=self.codebooks != "own", row_scales=self.row_scales != "never"
            )
        choices = self._alike(codebook, shape)
        (plan,) = allocate([choices], max(self.target_bits * choices.weights, choices.least()))
        return choices.layout(plan)

    def _alike(self, codebook: Known, shape: tuple[int, int]) -> Choices:
        """Return what a matrix may choose whose columns are all alike, without reservation."""
        rows, columns = shape
        options = column_options(rows, self._widths(codebook), ())
        distortion = np.tile(4.0 ** -options[:, 0], (columns, 1))
        return Choices(rows, options, distortion, codebook, self.count == "nominal")

    def _widths(self, codebook: Known) -> range:
        return range(self.min_bits, min(self.max_bits, codebook.widest) + 1)

    def _variants(self, codebook: Known) -> list[Known]:
        if isinstance(codebook, GroupTableCodebook):
            return [codebook]
        shared = {"auto": (True, False), "own": (False,), "shared": (True,)}[self.codebooks]
        scaled = {"auto": (True, False), "always": (True,), "never": (False,)}[self.row_scales]
        books = [codebook.variant(shared=s, row_scales=r) for s in shared for r in scaled]
        return [*books, *(TABLES if self.tables else ())]

    def _measure(
        self,
        statistics: ColumnStatistics,
        codebook: Known,
        columns: Tensor | None,
    ) -> Choices:
        nominal = self.count == "nominal"
        shares = (self.small, self.large) if self.reserve else ()
        options = column_options(statistics.shape[0], self._widths(codebook), shares)
        if isinstance(codebook, GroupTableCodebook):  # neighbours share scales: all are measured
            return measure_tables(statistics, codebook, options, nominal=nominal)
        return measure_choices(statistics, codebook, options, nominal=nominal, columns=columns)


def _known(codebook: Codebook) -> Known:
    """Return the codebook, whose errors at all widths are what is weighed."""
    if not isinstance(codebook, KMeans | GroupTableCodebook):
        raise ConfigError(
            "allocation=rate_distortion needs codebook=kmeans, kmeans_exact or group_table"
        )
    return codebook
