"""Decides on all matrices of a model at once, before the first is quantized."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from claq_exp.models.survey import survey_model
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.budget import Overhead
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import RateDistortion
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import JointReservation

SURVEY = 0.5  # of an allocation's time


def allocate_model(
    model: nn.Module,
    batches: list[Tensor],
    recipe: Recipe,
    *,
    overhead: Overhead,
    blocks_path: str | None = None,
    on_share: Callable[[float, str], None] = lambda _share, _where: None,
) -> dict[str, MatrixPlan]:
    """Survey the original model and spend the recipe's budget over all of its matrices.

    batches: calibration token ids [batch, seqlen]; the precision says how many windows are used.
    recipe: its precision is a RateDistortion and its codebook a KMeans.
    overhead: bits that a checkpoint with given layouts takes beside its matrices.
    Raises ConfigError when the budget cannot be met.
    """
    precision, codebook, reservation = recipe.precision, recipe.codebook, recipe.reservation
    assert isinstance(precision, RateDistortion)
    assert isinstance(codebook, KMeans)
    statistics = survey_model(
        model,
        _first_windows(batches, precision.windows),
        recipe.solver,
        gradients=precision.importance == "fisher",
        blocks_path=blocks_path,
        on_share=lambda share, where: on_share(SURVEY * share, where),
    )
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
