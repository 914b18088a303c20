"""Measures the model of a run before and after it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from claq_exp.checkpoint.reader import open_checkpoint, read_rounding
from claq_exp.config import ExperimentConfig
from claq_exp.evaluation.divergence import Comparison, LogitStore
from claq_exp.evaluation.measure import Measurement, Meter
from claq_exp.evaluation.perplexity import Corpus
from claq_exp.evaluation.predict import Subject
from claq_exp.evaluation.scores import ScoreStore
from claq_exp.foreign.found import Foreign
from claq_exp.foreign.load import load_foreign
from claq_exp.models.ends import in_blocks
from claq_exp.models.source import fingerprint
from claq_exp.models.stream import StreamedModel
from claq_exp.payload.base import Layout
from claq_exp.runtime.load import load_checkpoint
from claq_exp.sources.cache import cache_folder
from claq_exp.sources.code import code_behind
from claq_exp.system.machine import device_name, versions

QUANTIZED = "quantized"
MEASURING = "claq_exp.evaluation.measure"
ORIGINAL_CODE = (MEASURING, "claq_exp.models.load", "claq_exp.models.dispatch")
CHECKPOINT_CODE = (MEASURING, "claq_exp.runtime.load")
FOREIGN_CODE = (MEASURING, "claq_exp.foreign.load")


def measured_on(config: ExperimentConfig, device: str, model: str, code: str) -> dict[str, Any]:
    """Return what everything measured of a model depends on.  model, code: hashes of both."""
    return {
        "model": model,
        "dtype": config.model.dtype,
        "device": device_name(device),
        "versions": versions(),
        "code": code,
    }


def checkpoint_subject(
    config: ExperimentConfig, folder: Path, device: str, *, streams: bool, name: str = QUANTIZED
) -> Subject:
    """Return a checkpoint as what is to be measured.

    config: its `model.dtype` is settled.  name: of the model in what is told of it.
    """
    place: dict[str, Any] = {
        "dtype": config.model.dtype,
        "device": device,
        "trust_remote_code": config.model.trust_remote_code,
    }
    return Subject(
        name,
        None if config.device_map else device,
        lambda: load_checkpoint(
            folder, kernel=config.runtime.kernel, device_map=config.device_map, **place
        ),
        (lambda: open_checkpoint(folder, blocks_path=config.model.blocks, **place))
        if streams
        else None,
    )


def foreign_subject(config: ExperimentConfig, foreign: Foreign, device: str) -> Subject:
    """Return a checkpoint of another owner as what is to be measured, whole in memory."""
    return Subject(
        QUANTIZED,
        None if config.device_map else device,
        lambda: load_foreign(
            foreign,
            dtype=config.model.dtype,
            device=device,
            device_map=config.device_map,
            trust_remote_code=config.model.trust_remote_code,
        ),
    )


def activation_bits(folder: Path, layouts: Mapping[str, Layout]) -> float | None:
    """Return the bits of an input number of a checkpoint's layers on average; None if not rounded.

    The inputs of layers side by side, which are rounded once, count for each.
    """
    rounding = read_rounding(folder)
    if rounding is None:
        return None
    return rounding.bits(layout.columns for layout in in_blocks(layouts).values())


@dataclass(frozen=True)
class Bench:
    """Measurements of a checkpoint and of its original.

    What was measured of a model before is found and not repeated.
    checkpoint: its folder.  work: folder for what is only needed until the end.
    model: hash of the original's files.  tasks: task -> hash of all that defines its score.
    vocabulary: logits of a token.  streams: models are read block by block.
    on_event: called with a kind of event and its data.  on_share: with (share of the work, what).
    foreign: the checkpoint, where another owner made it.
    """

    config: ExperimentConfig
    checkpoint: Path
    work: Path
    model: str
    tasks: Mapping[str, str]
    tokenizer: PreTrainedTokenizerBase
    corpora: Mapping[str, Corpus]
    device: str
    vocabulary: int
    streams: bool
    on_event: Callable[..., None]
    on_share: Callable[[float, str], None]
    foreign: Foreign | None = None

    def original_logits(self) -> LogitStore:
        """Return where the original's logits are kept for the comparison with the checkpoint's."""
        wanted = self.config.evaluation.kl_windows
        counts = {name: len(corpus.windows) for name, corpus in self.corpora.items()}
        if wanted is not None:
            counts = {name: min(wanted, count) for name, count in counts.items()}
        return LogitStore(self.work, counts)

    def measure_original(
        self, model: StreamedModel, load: Callable[[], PreTrainedModel]
    ) -> Measurement:
        """Measure the original, and keep its logits.  load: brings it into memory."""
        logits = self.original_logits()
        wanted = {} if logits.complete() else logits.windows
        store = self._scores(cache_folder() / "originals", self.model, ORIGINAL_CODE)
        device = None if self.config.device_map else self.device
        subject = Subject("original", device, load, (lambda: model) if self.streams else None)
        return self._measure(subject, store, wanted, logits.record)

    def measure_checkpoint(
        self, comparison: Comparison | None, folder: Path | None = None, name: str = QUANTIZED
    ) -> Measurement:
        """Measure the checkpoint as it is on disk.

        comparison: what compares its logits with the original's; None where there are none.
        folder, name: of another one, which a run holds for a while.
        """
        if self.foreign is not None:
            subject = foreign_subject(self.config, self.foreign, self.device)
            content, code = self.foreign.content(), FOREIGN_CODE
        else:
            folder = folder or self.checkpoint
            subject = checkpoint_subject(
                self.config, folder, self.device, streams=self.streams, name=name
            )
            content, code = fingerprint(folder), CHECKPOINT_CODE
        store = self._scores(self.work / "scores", content, code)
        if comparison is None:
            return self._measure(subject, store, {}, lambda _corpus, _window, _logits: None)
        return self._measure(subject, store, self.original_logits().windows, comparison.add)

    def _scores(self, folder: Path, model: str, code: tuple[str, ...]) -> ScoreStore:
        """Return the scores that are known of a model with this content.

        code: the modules that load and measure it.
        """
        about = measured_on(self.config, self.device, model, code_behind(*code))
        return ScoreStore(folder, {**about, "kernel": self.config.runtime.kernel})

    def _measure(
        self,
        subject: Subject,
        store: ScoreStore,
        logit_windows: dict[str, int],
        on_logits: Callable[[str, int, Tensor], None],
    ) -> Measurement:
        meter = Meter(
            subject,
            self.vocabulary,
            self.tokenizer,
            self.device,
            store,
            self.tasks,
            logit_windows,
            strict=self.config.strict,
            on_value=lambda kind, name, value: self.on_event(
                kind, dataset=name, model=subject.name, value=value
            ),
            on_share=self.on_share,
            on_logits=on_logits,
        )
        return meter.measure(self.corpora, self.config.evaluation)
