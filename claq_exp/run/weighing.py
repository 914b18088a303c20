"""Measures what the calibration tokens weigh, all processes of a run together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from claq_exp.calibration.output_gradients import BackwardPass, OnShare
from claq_exp.calibration.token_weights import TokenWeights
from claq_exp.config import ExperimentConfig
from claq_exp.models.stream import BlockedModel
from claq_exp.run.assist import opened
from claq_exp.run.shape import HIDDEN_SHARE
from claq_exp.system.distributed import Ranks
from claq_exp.system.interruption import Interrupted, graceful
from claq_exp.system.resources import free_memory


@dataclass(frozen=True)
class Weighing:
    """A backward pass over the calibration windows, as the first process describes it.

    config, source, work: as of `claq_exp.run.assist.Quantization`.  weights: where it goes.
    states: bytes of what enters all blocks, of one batch.
    """

    config: ExperimentConfig
    source: Path
    work: Path
    weights: TokenWeights
    states: int

    def take_part(self, ranks: Ranks) -> None:
        """Do this process' part; where it is asked to end, so that all end after the same batch."""
        model = opened(self.config, self.source, self.work)
        with graceful() as interruption, interruption.finishing():
            self.measure(model, ranks, lambda: interruption.asked)

    def measure(
        self,
        model: BlockedModel,
        ranks: Ranks,
        stopping: Callable[[], bool] = lambda: False,
        on_share: OnShare = lambda _share, _where: None,
    ) -> None:
        """Measure the batches that are not kept yet, as every process of the run does.

        As many go at once as have room in memory; each is kept when it is done.
        Raises Interrupted between two of them where a process is `stopping`.
        """
        weights, batches = self.weights, self.weights.batches
        room = int(HIDDEN_SHARE * free_memory(str(model.device)) / ranks.size)
        missing = [n for n in range(len(batches)) if not weights.has(n)] if ranks.is_first else []
        missing, at_once = ranks.tell((missing, max(1, room // self.states)))
        if not missing:
            return
        backward = BackwardPass(model, batches, weights.objective.groups)
        for start in range(0, len(missing), at_once * ranks.size):
            chunk = missing[start : start + at_once * ranks.size]
            share = len(chunk) / len(batches)
            found = backward.squares(ranks.share(chunk), partial(_shared, on_share, share))
            flat = (weights.flat(squares) for squares in found)
            for squares, number in zip(ranks.in_order(flat, len(chunk)), chunk, strict=False):
                weights.keep(number, squares)
            if ranks.any(stopping()):
                raise Interrupted
        ranks.wait()  # for what the first has kept


def _shared(on_share: OnShare, share: float, part: float, where: str) -> None:
    """Tell of a part of a share of all work."""
    on_share(share * part, where)
