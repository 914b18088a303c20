"""Decides on all matrices of a model at once, before the first is quantized."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from claq_exp.allocate.allocation import Allocation, OnShare
from claq_exp.allocate.head import SurveyedHead
from claq_exp.allocate.survey import statistics_of, statistics_tensors, survey_model
from claq_exp.calibration.token_weights import TokenWeights
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.budget import Overhead
from claq_exp.quantize.recipe import Recipe
from claq_exp.sources.code import code_of
from claq_exp.sources.kept import digest_of

SURVEY = 0.5  # of an allocation's time
Keep = Callable[[dict[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def allocate_model(  # noqa: PLR0913 - every one has a default, but what is allocated
    model: PreTrainedModel,
    batches: list[Tensor],
    recipe: Recipe,
    allocation: Allocation,
    *,
    overhead: Overhead,
    blocks_path: str | None = None,
    head: SurveyedHead | None = None,
    weights: TokenWeights | None = None,
    keep: Keep = lambda _key, make: make(),
    on_share: OnShare = lambda _share, _where: None,
) -> dict[str, MatrixPlan]:
    """Survey the original model and spend the allocation's budget over its matrices.

    batches: calibration token ids [batch, seqlen].
    overhead: bits that a checkpoint with given layouts takes beside its matrices.
    head: a head whose columns compete with those of the blocks.
    weights: of the calibration tokens, where they do not count alike.
    keep: returns the survey's tensors for what they depend on besides the model, or makes them.
    Raises ConfigError when the budget cannot be met.
    """
    survey = allocation.survey()
    if survey is None:
        return {}
    windows = _first_windows(batches, survey.windows)

    def measure() -> dict[str, Tensor]:
        statistics = survey_model(
            model,
            windows,
            recipe.solver,
            gradients=survey.gradients,
            blocks_path=blocks_path,
            head=head,
            weights=weights,
            on_share=lambda share, where: on_share(SURVEY * share, where),
        )
        return statistics_tensors(statistics)

    key = {
        "windows": [digest_of(batch) for batch in windows],
        "solver": [repr(recipe.solver), code_of([Path(inspect.getfile(type(recipe.solver)))])],
        "gradients": survey.gradients,
        "blocks": blocks_path,
    }
    if head is not None:
        key["head"] = [head.name, head.tied, repr(head.solver)]
    if weights is not None:
        key["objective"] = repr(weights.objective)
        key["weighed"] = [digest_of(batch) for batch in batches]
    return allocation.plan_model(
        statistics_of(model, keep(key, measure)),
        recipe.codebook,
        overhead=overhead,
        on_share=lambda share, where: on_share((1 - SURVEY) * share, where),
    )


def _first_windows(batches: list[Tensor], windows: int) -> list[Tensor]:
    taken: list[Tensor] = []
    for batch in batches:
        left = windows - sum(len(part) for part in taken)
        if left > 0:
            taken.append(batch[:left])
    return taken
