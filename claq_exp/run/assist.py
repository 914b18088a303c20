"""What the other processes of a run do: they take part in what the first one runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from claq_exp.calibration.streams import HiddenForm
from claq_exp.calibration.token_weights import TokenWeights
from claq_exp.checkpoint.store import BlockStore
from claq_exp.config import ExperimentConfig
from claq_exp.models.load import open_model
from claq_exp.models.stream import BlockedModel
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.stale_kernels import drop_stale_kernels
from claq_exp.run.ends import End
from claq_exp.run.quantize import quantize_model
from claq_exp.run.watcher import Watcher
from claq_exp.system.distributed import Ranks
from claq_exp.system.interruption import graceful
from claq_exp.system.machine import choose_device, settle
from claq_exp.tracking.progress import noise_to
from claq_exp.train.window import UNTUNED, Tune
from claq_exp.transform.folding import UNTRANSFORMED, Transform


class SharedWork(Protocol):
    """Work on units of a stage that several processes share; the first one describes it."""

    def take_part(self, ranks: Ranks) -> None:
        """Do this process' part."""


@dataclass(frozen=True)
class Quantization:
    """A quantization, as the first process describes it to the others.

    config: its `model.dtype` is settled.  source: folder of the original model, which was checked.
    work: folder of what was converted of it.  store: a follower.  The rest is as of
    `quantize_model`.
    """

    config: ExperimentConfig
    source: Path
    work: Path
    batches: list[Tensor]
    recipe: Recipe
    store: BlockStore
    plans: Mapping[str, MatrixPlan]
    hidden_form: HiddenForm
    transform: Transform = UNTRANSFORMED
    tune: Tune = UNTUNED
    ends: tuple[End, ...] = ()
    weights: TokenWeights | None = None

    def take_part(self, ranks: Ranks) -> None:
        """Do this process' part; where it is asked to end, so that all end after the same group."""
        model = opened(self.config, self.source, self.work)
        with graceful() as interruption, interruption.finishing():
            self.quantize(model, self.store, Watcher(stopping=lambda: interruption.asked), ranks)

    def quantize(
        self, model: BlockedModel, store: BlockStore, watcher: Watcher, ranks: Ranks
    ) -> None:
        """Quantize a model, as every process of the run does; see `quantize_model`."""
        quantize_model(
            model,
            self.batches,
            self.recipe,
            store,
            plans=self.plans,
            hidden_form=self.hidden_form,
            transform=self.transform,
            tune=self.tune,
            ends=self.ends,
            weights=self.weights,
            watcher=watcher,
            strict=self.config.strict,
            ranks=ranks,
        )


def opened(config: ExperimentConfig, source: Path, work: Path) -> BlockedModel:
    """Open the original in a process that takes part; fields as of `Quantization`."""
    device = choose_device(config.device)
    drop_stale_kernels()
    settle(config.seed, config.threads)
    return open_model(
        source,
        work,
        dtype=config.calibrating_dtype,
        device=device,
        blocks_path=config.model.blocks,
        trust_remote_code=config.model.trust_remote_code,
        check=False,
    )


def assist(ranks: Ranks) -> int:
    """Take part in what the first process asks for until it is done; return the exit code."""
    with noise_to(Path(os.devnull)):
        while (work := _told(ranks)) is not None:
            work.take_part(ranks)
    return 0


def _told(ranks: Ranks) -> SharedWork | None:
    work: SharedWork | None = ranks.tell()
    return work
