"""SmoothQuant: large input channels are made smaller, and the columns that they meet larger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from claq_exp.errors import ConfigError
from claq_exp.models.blocks import BlockInputs, run_block, watched
from claq_exp.models.discover import linear_weight
from claq_exp.system.distributed import ALONE, Ranks
from claq_exp.transform.folding import Fold, Move, find_folds


@dataclass(frozen=True)
class Smooth:
    """Divide channel j of a norm's output by s_j = max|x_j|^alpha / max|w_j|^(1 - alpha).

    The maxima are over all calibration tokens, and over the rows of all matrices that take the
    channel, which are multiplied by s_j.  The model computes the same.
    alpha: how much of the difficulty goes from inputs to weights; 0.5 is the paper's for most
    models.

    Source: SmoothQuant (arXiv 2211.10438), equation 4.
    """

    passes: ClassVar[float] = 1.0

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"transform.alpha is {self.alpha}; give a number from 0 to 1")

    def scales(self, weight_maxima: Tensor, input_maxima: Tensor) -> Tensor:
        """Return s of each channel, float64: 1 where a channel is never used.

        weight_maxima, input_maxima: [in], largest magnitudes.
        """
        weights, inputs = weight_maxima.double(), input_maxima.double()
        scales = inputs.pow(self.alpha) / weights.pow(1 - self.alpha)
        usable = (weights > 0) & (inputs > 0) & scales.isfinite() & (scales > 0)
        return torch.where(usable, scales, 1.0)

    def run(self, block: nn.Module, inputs: BlockInputs, ranks: Ranks = ALONE) -> list[Move]:
        """Return the scales of each norm whose output goes to matrices alone; see `Transform`."""
        folds = ranks.tell(find_folds(block, inputs) if ranks.is_first else [])
        maxima = {fold.norm: torch.zeros(len(fold.channels(block))) for fold in folds}
        sinks = {block.get_submodule(name): _largest(kept) for name, kept in maxima.items()}
        for batch in range(len(inputs.hidden) if folds else 0):
            with watched({}, sinks):
                run_block(block, inputs, batch)
        for kept in maxima.values():
            ranks.max_(kept)
        return [Move(fold, self.scales(_columns(block, fold), maxima[fold.norm])) for fold in folds]


def _largest(kept: Tensor) -> Callable[[Tensor], None]:
    def sink(output: Tensor) -> None:
        found = output.detach().reshape(-1, output.shape[-1]).abs().amax(dim=0)
        torch.maximum(kept, found.to(kept), out=kept)

    return sink


def _columns(block: nn.Module, fold: Fold) -> Tensor:
    """Return the largest magnitude in each column of all matrices that take a norm's output."""
    weights = [linear_weight(block.get_submodule(name)).detach() for name in fold.consumers]
    maxima = [weight.abs().amax(dim=0).float().cpu() for weight in weights]
    return torch.stack(maxima).amax(dim=0)
