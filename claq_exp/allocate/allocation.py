"""What an allocation is asked, stage by stage of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from claq_exp.errors import ConfigError
from claq_exp.payload.base import Layout
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.budget import MODEL, BudgetConfig, Overhead
from claq_exp.quantize.codebook import Codebook
from claq_exp.quantize.recipe import Recipe, planned_layouts
from claq_exp.quantize.statistics import ColumnStatistics

OnShare = Callable[[float, str], None]
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Survey:
    """What an allocation must know of the original model.

    windows: calibration windows that go through it.  gradients: measure the importance of rows too.
    """

    windows: int
    gradients: bool


class Allocation(Protocol):
    """A rule that gives out the bits of a whole model; derive from it to have these defaults.

    decides: the rule plans every matrix, so that precision and reservation are `none`.
    """

    decides: ClassVar[bool] = True

    def check(self, recipe: Recipe) -> None:
        """Raise ConfigError for strategies that this rule cannot go with."""
        if recipe.allocated != self.decides:
            raise ConfigError(
                "this allocation decides widths and outliers: use precision=none reservation=none"
                if self.decides
                else "precision=none leaves the widths to an allocation; choose "
                "allocation=rate_distortion, or another precision"
            )

    def within(self, budget: BudgetConfig) -> Allocation:
        """Return the rule with a budget as its target."""
        return self

    def planned_layouts(
        self, recipe: Recipe, shapes: Shapes, overhead: Overhead
    ) -> dict[str, Layout]:
        """Return about how each matrix will be stored, before any weight is known.

        shapes: name -> (out, in).  overhead: bits that a checkpoint takes beside these layouts.
        """
        return planned_layouts(recipe, shapes)

    def survey(self) -> Survey | None:
        """Return what this rule must know of the original; None where it asks for nothing."""
        return None

    def plan_model(
        self,
        statistics: Mapping[str, ColumnStatistics],
        codebook: Codebook,
        *,
        overhead: Overhead = lambda _: 0.0,
        on_share: OnShare = lambda _share, _name: None,
    ) -> dict[str, MatrixPlan]:
        """Return a plan for every matrix of a surveyed model.

        overhead: bits that a checkpoint with these layouts takes beside them.  on_share: called
        with (share of the work just done, name).  Raises ConfigError when a budget cannot be met.
        """
        return {}


def check_allocated_end(end: str, survey: Survey | None, budget: BudgetConfig) -> None:
    """Raise ConfigError where nothing can decide the widths of an embedding or head.

    end: the words that leave them to an allocation.  survey: what that asks for.
    """
    if survey is None:
        raise ConfigError(
            f"{end} leaves its widths to an allocation; choose allocation=rate_distortion, or "
            "embedding=kmeans"
        )
    if budget.kind != MODEL or budget.bits is None:
        raise ConfigError(
            f"{end} shares the bits of the whole checkpoint with the layers of blocks; set "
            "budget.kind=model and budget.bits, or choose embedding=kmeans"
        )
    if not survey.gradients:
        raise ConfigError(
            f"{end} is weighed by what its logits do to the loss; set "
            "allocation.importance=fisher, or choose embedding=kmeans"
        )
