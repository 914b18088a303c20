"""Decides on all matrices of a model at once, before the first is quantized."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from claq_exp.models.survey import statistics_of, statistics_tensors, survey_model
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.budget import Overhead
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import RateDistortion
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import JointReservation
from claq_exp.sources.code import code_of
from claq_exp.sources.kept import digest_of

SURVEY = 0.5  # of an allocation's time
FISHER = "fisher"
Keep = Callable[[dict[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def allocate_model(
    model: PreTrainedModel,
    batches: list[Tensor],
    recipe: Recipe,
    *,
    overhead: Overhead,
    blocks_path: str | None = None,
    keep: Keep = lambda _key, make: make(),
    on_share: Callable[[float, str], None] = lambda _share, _where: None,
) -> dict[str, MatrixPlan]:
    """Survey the original model and spend the recipe's budget over all of its matrices.

    batches: calibration token ids [batch, seqlen]; the precision says how many windows are used.
    recipe: its precision is a RateDistortion and its codebook a KMeans.
    overhead: bits that a checkpoint with given layouts takes beside its matrices.
    keep: returns the survey's tensors for what they depend on besides the model, or makes them.
    Raises ConfigError when the budget cannot be met.
    """
    precision, codebook, reservation = recipe.precision, recipe.codebook, recipe.reservation
    assert isinstance(precision, RateDistortion)
    assert isinstance(codebook, KMeans)
    windows, gradients = _first_windows(batches, precision.windows), precision.importance == FISHER

    def survey() -> dict[str, Tensor]:
        statistics = survey_model(
            model,
            windows,
            recipe.solver,
            gradients=gradients,
            blocks_path=blocks_path,
            on_share=lambda share, where: on_share(SURVEY * share, where),
        )
        return statistics_tensors(statistics)

    key = {
        "windows": [digest_of(batch) for batch in windows],
        "solver": [repr(recipe.solver), code_of([Path(inspect.getfile(type(recipe.solver)))])],
        "gradients": gradients,
        "blocks": blocks_path,
    }
    statistics = statistics_of(model, keep(key, survey))
    shares: tuple[float, ...] = ()
    if isinstance(reservation, JointReservation):
        shares = (reservation.small, reservation.large)
    return precision.plan_model(
        statistics,
        codebook,
        shares,
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
