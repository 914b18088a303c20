"""The stages of one run, done one after another."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from claq_exp.allocate.model import allocate_model
from claq_exp.allocate.plans_file import load_plans, save_plans
from claq_exp.calibration.streams import HiddenForm
from claq_exp.calibration.token_weights import TokenWeights
from claq_exp.checkpoint.reader import read_layouts
from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import Sizes, checkpoint_sizes, write_card, write_checkpoint
from claq_exp.config import ExperimentConfig
from claq_exp.errors import telling_line
from claq_exp.evaluation.divergence import Comparison, Divergence
from claq_exp.evaluation.measure import Measurement
from claq_exp.models.activations import observe_inputs
from claq_exp.models.dispatch import loaded
from claq_exp.models.load import open_model, stored_dtype
from claq_exp.models.original import Original, check_strictly
from claq_exp.models.source import weight_bytes
from claq_exp.models.stream import StreamedModel
from claq_exp.models.towers import text_config
from claq_exp.quantize.activation.rounding import Rounding, needs_text, settle_rounding
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.run import stages
from claq_exp.run.assist import Quantization
from claq_exp.run.ends import EMBEDDING
from claq_exp.run.inputs import Fetched, Tokens
from claq_exp.run.lines import event_lines, sizes_line
from claq_exp.run.measuring import QUANTIZED, Bench, activation_bits, measured_on
from claq_exp.run.plan import Plan
from claq_exp.run.quantize import QUANTIZE
from claq_exp.run.results import build_results, text_rows, window_rows
from claq_exp.run.shape import HIDDEN_SHARE
from claq_exp.run.stages import STAGES, Stage
from claq_exp.run.watcher import Watcher
from claq_exp.run.weighing import Weighing
from claq_exp.run_folder import (
    LAYERS_FILE,
    PICTURE_FILE,
    WINDOWS_FILE,
    RunFolder,
)
from claq_exp.run_folder.fallbacks import count_fallbacks
from claq_exp.run_folder.layers import write_layers
from claq_exp.run_folder.windows import write_windows
from claq_exp.sources.code import code_behind
from claq_exp.sources.kept import kept_tensors
from claq_exp.system.distributed import Ranks
from claq_exp.system.heap import return_at_once
from claq_exp.system.interruption import Interruption
from claq_exp.system.machine import versions
from claq_exp.system.resources import free_memory, peak_memory, reset_peak
from claq_exp.tracking.events import EventLog
from claq_exp.tracking.progress import RunProgress

ALLOCATION = "allocation.safetensors"
CONVERTED = "converted"
GRADIENTS = "output_gradients"
SURVEY_CODE = (
    "claq_exp.allocate.survey",
    "claq_exp.calibration.output_gradients",
    "claq_exp.models.load",
)


@dataclass
class Job:
    """The stages of one run; each leaves in the folder what the same command need not do again.

    What a stage makes for later ones: `model`, the original; `original`, its measurement; `plans`
    of matrices; `store`, the quantized blocks; `rounding` of activations; `quantized` and `kl`, the
    measurement of the checkpoint; `after`, those after stages before it.
    """

    config: ExperimentConfig
    folder: RunFolder
    fetched: Fetched
    source: Original
    tokens: Tokens
    plan: Plan
    device: str
    progress: RunProgress
    events: EventLog
    ranks: Ranks
    interruption: Interruption
    notes: list[str] = field(default_factory=list)
    plans: dict[str, MatrixPlan] = field(default_factory=dict)
    rounding: Rounding | None = None
    command: str = field(init=False)
    model: StreamedModel = field(init=False)
    store: BlockStore = field(init=False)
    original: Measurement = field(init=False)
    quantized: Measurement = field(init=False)
    kl: dict[str, Divergence] = field(init=False)
    after: dict[str, tuple[Measurement, dict[str, Divergence]]] = field(default_factory=dict)

    @cached_property
    def bench(self) -> Bench:
        """What measures the model before and after."""
        return Bench(
            self.config,
            self.folder.checkpoint,
            self.folder.work,
            self.fetched.contents["model"],
            self.fetched.tasks,
            self.tokens.tokenizer,
            self.tokens.corpora,
            self.device,
            vocabulary=text_config(self.source.config).vocab_size,
            streams=self.plan.needs.streams,
            on_event=self.events.event,
            on_share=self.progress.advance,
        )

    def results(self, command: str) -> dict[str, Any]:
        """Go through all stages and return the content of results.json."""
        started, self.command = datetime.now(UTC), command
        self.events.event("started", run=self.folder.path.name, versions=versions())
        for text, row in text_rows(self.tokens.text_losses).items():
            if any(row.values()):
                self.events.event("text", text=text, **row)
        for stage in STAGES:
            if stage.name in self.plan.costs:
                self._go_through(stage)
        report = self._report()
        layouts = read_layouts(self.folder.checkpoint)
        self._plot(report)
        windows = window_rows(self.tokens.corpora, self.original, self.quantized, self.kl)
        write_windows(self.folder.path / WINDOWS_FILE, windows)
        results = build_results(
            config=self.config,
            hash_=self.folder.hash,
            command=command,
            started=started,
            device=self.device,
            sizes=self._sizes(self.folder.checkpoint),
            activation_bits=activation_bits(self.folder.checkpoint, layouts),
            original_bytes=weight_bytes(self.fetched.model),
            corpora=self.tokens.corpora,
            losses=self.tokens.text_losses,
            original=self.original,
            quantized=self.quantized,
            kl=self.kl,
            after=self.after,
            spent=self.events.spent(),
            report=report,
            source=self.source,
            kept_ends=self.plan.kept_ends,
        )
        write_card(self.folder.checkpoint, self._card(self.folder.checkpoint, results))
        return results

    def _card(self, folder: Path, results: dict[str, Any] | None = None) -> str:
        """Return the model card of a checkpoint."""
        from claq_exp.reporting.card import model_card  # not needed until here

        sizes = self._sizes(folder)
        bits = {kind: getattr(sizes, kind) for kind in ("nominal", "linear", "model")}
        return model_card(self.config.as_dict(), self.command, bits, sizes.bytes, results)

    def _sizes(self, folder: Path) -> Sizes:
        return checkpoint_sizes(folder, read_layouts(folder), self.plan.parameters)

    def _go_through(self, stage: Stage) -> None:
        """Do a stage under its name in the progress bar, unless an earlier try has left its work.

        What it took is noted; the units of a stage with several timings note their own.
        """
        step = STEPS[stage.name]
        if step.found(self):
            return
        self.progress.stage(stage.name)
        reset_peak()
        started = time.perf_counter()
        step.run(self)
        if len(stage.timings) == 1:
            spent = {stage.timings[0]: round(time.perf_counter() - started, 3)}
            self.events.event("stage", stage=stage.name, peak_memory_bytes=peak_memory(), **spent)

    @cached_property
    def batches(self) -> list[Tensor]:
        """The calibration windows, so many at a time as go through the model together."""
        return list(self.tokens.calibration.split(self.config.calibration.batch_size))

    def load(self) -> None:
        """Open the original and check what is stored of it."""
        self.model = self._open_original(found=self._note_source)

    def evaluate_original(self) -> None:
        """Measure the original, and keep its logits."""
        load = partial(self._open_original, check=False)
        device_map = self.config.device_map
        self.original = self.bench.measure_original(self.model, lambda: loaded(load(), device_map))

    def _calibrate_on_it(self) -> None:
        """Have the model in the type for quantizing; it was measured before."""
        if self.config.calibrating_dtype != self.config.model.dtype:
            self.model = self._open_original(check=False, calibrating=True)

    @cached_property
    def weights(self) -> TokenWeights | None:
        """What calibration tokens weigh; None where they count alike."""
        objective = self.config.objective_rule()
        if not objective.wants:
            return None
        names = tuple(self.plan.layouts)
        return TokenWeights(self.folder.work / GRADIENTS, self.batches, names, objective)

    def weigh(self) -> None:
        """Measure what calibration tokens weigh, with the other processes of the run."""
        if self.weights is None:
            return
        place, states = self.folder.work / CONVERTED, self.plan.states_bytes
        self._calibrate_on_it()
        shared = Weighing(self.config, self.fetched.model, place, self.weights, states)
        self.ranks.tell(shared)
        with self.interruption.finishing():
            shared.measure(
                self.model, self.ranks, lambda: self.interruption.asked, self.progress.advance
            )

    def quantize(self) -> None:
        """Quantize block by block, with the other processes of the run."""
        self._calibrate_on_it()
        self.store = BlockStore(self.folder.work / "blocks", self._store_identity())
        self.store.open(self._note_damage)
        return_at_once()
        shared = Quantization(
            self.config,
            self.fetched.model,
            self.folder.work / CONVERTED,
            self.batches,
            self.plan.recipe,
            self.store.follower(),
            self.plans,
            self._hidden_form(),
            self.config.rewriting(),
            self.config.tuning(),
            self.plan.ends,
            self.weights,
        )
        self.ranks.tell(shared)
        watcher = Watcher(
            event=self._quantize_event,
            share=self.progress.advance,
            stopping=lambda: self.interruption.asked,
        )
        with self.interruption.finishing():
            shared.quantize(self.model, self.store, watcher, self.ranks)
        report = self._report()
        write_layers(self.folder.path / LAYERS_FILE, report)
        counts = count_fallbacks(report, self.plan.kept_ends)
        if counts["layers"] or self.plan.kept_ends:
            self.events.event("fallbacks", **counts)

    def _report(self) -> list[dict[str, Any]]:
        """Return the rows of layers.csv: of the layers of blocks, then of embedding and head."""
        return [*self.store.report(QUANTIZE), *self.store.report(EMBEDDING)]

    def exported(self) -> bool:
        """Tell whether the checkpoint is there, which is whole then."""
        return self.folder.checkpoint.is_dir()

    def observe_activations(self) -> None:
        """Settle how activations are rounded from those of the original model."""
        opened = self._open_original(check=False, calibrating=True)
        names = list(self.plan.layouts)
        opened.overlay.update(self.store.dense())
        observed = observe_inputs(opened, self.batches, names, self.progress.advance)
        self.rounding = settle_rounding(self.config.activation_rule(), observed)

    def export(self) -> None:
        """Write the checkpoint."""
        rule = self.config.activation_rule()
        if not needs_text(rule):
            self.rounding = settle_rounding(rule, None)
        self._write(self.folder.checkpoint, self.rounding, self._card)
        self.progress.line(sizes_line(self._sizes(self.folder.checkpoint)))

    def _write(
        self, folder: Path, rounding: Rounding | None, card: Callable[[Path], str] | None = None
    ) -> None:
        write_checkpoint(
            folder,
            self.model.model,
            self.tokens.tokenizer,
            self.store.packed(),
            stored_dtype(self.source.config),
            source=self.fetched.model,
            read=self.model.read,
            rounding=rounding,
            card=card,
        )

    def evaluate_quantized(self) -> None:
        """Measure the checkpoint, loaded back from disk."""
        del self.model
        gc.collect()  # the original model must be gone before the checkpoint is loaded
        self.quantized, self.kl = self._measure(self.folder.checkpoint, QUANTIZED)

    def evaluate_after_quantize(self) -> None:
        """Measure the model with its quantized weights, before activations are rounded."""
        folder = self.folder.work / "after_quantize"
        if not folder.is_dir():
            self._write(folder, None)
        self.after[stages.QUANTIZE.name] = self._measure(folder, "after quantize")
        shutil.rmtree(folder)

    def _measure(self, folder: Path, name: str) -> tuple[Measurement, dict[str, Divergence]]:
        """Measure a checkpoint, beside the logits of the original where they are compared."""
        comparison = Comparison(self.bench.original_logits())
        measured = self.bench.measure_checkpoint(comparison, folder, name)
        kl = comparison.results()
        for corpus, row in kl.items():
            facts = {"top1_agreement": row.top1_agreement, "tokens": row.tokens}
            self.events.event("kl", dataset=corpus, model=name, value=row.mean, **facts)
        return measured, kl

    def _plot(self, report: list[dict[str, Any]]) -> None:
        """Draw layers.png; a run has its results without it."""
        try:
            from claq_exp.reporting.plots import plot_layers  # its library takes memory until here

            plot_layers(report, self.folder.path / PICTURE_FILE)
        except Exception as error:  # noqa: BLE001 - of whatever library
            self.notes.append(f"{PICTURE_FILE} could not be drawn: {telling_line(error)}")
            self.events.event("not_drawn", picture=PICTURE_FILE, error=telling_line(error))

    def _note_damage(self, what: str) -> None:
        self.notes.append(f"{what}; it was made again")
        self.events.event("damaged", what=what)

    def _note_source(self, found: Original) -> None:
        """Keep what is known of the model once its weights are found; see `check_strictly`."""
        self.source = found
        if found.remarks():
            self.events.event("source", **found.as_dict())
        if self.config.strict:
            check_strictly(found)

    def _open_original(
        self,
        *,
        check: bool = True,
        found: Callable[[Original], None] = lambda _: None,
        calibrating: bool = False,
    ) -> StreamedModel:
        """Open the original, in the type to measure it in, or to calibrate on it."""
        model = self.config.model
        return open_model(
            self.fetched.model,
            self.folder.work / CONVERTED,
            dtype=self.config.calibrating_dtype if calibrating else model.dtype,
            device=self.device,
            blocks_path=model.blocks,
            trust_remote_code=model.trust_remote_code,
            check=check,
            found=found,
        )

    def _store_identity(self) -> dict[str, str]:
        """Return what must be the same for a block to go on where another left off."""
        found = versions()
        return {
            "run": self.folder.hash,
            "device": self.device.partition(":")[0],
            **{package: found[package] for package in ("torch", "transformers", "numba")},
        }

    def _hidden_form(self) -> HiddenForm:
        """Decide where hidden states are kept: in the memory that there is, or on disk."""
        plan = self.plan
        on_disk = plan.hidden_bytes > HIDDEN_SHARE * free_memory(self.device)
        return HiddenForm(plan.hidden_dtype, on_disk)

    def _quantize_event(self, name: str, data: dict[str, Any]) -> None:
        if name in ("block", "stage"):
            data = {**data, "peak_memory_bytes": peak_memory()}
            reset_peak()
        self.events.event(name, **data)
        peak, verbose = peak_memory(), self.progress.verbose
        for line in event_lines(
            name, data, self._report, self.plan.blocks, peak=peak, verbose=verbose
        ):
            self.progress.line(line)

    def allocated(self) -> bool:
        """Tell whether every matrix was decided on before, and read what."""
        path = self.folder.work / ALLOCATION
        if path.is_file():
            self.plans = load_plans(path)
        return path.is_file()

    def allocate(self) -> None:
        """Decide on every matrix at once."""
        self.plans = allocate_model(
            self._open_original(check=False, calibrating=True).load(),
            [batch.to(self.device) for batch in self.batches],
            self.plan.recipe,
            self.plan.allocation,
            blocks_path=self.config.model.blocks,
            head=next((end.surveyed() for end in self.plan.ends if end.allocated), None),
            weights=self.weights,
            overhead=self.plan.description,
            keep=self._keep_survey,
            on_share=self.progress.advance,
        )
        save_plans(self.folder.work / ALLOCATION, self.plans)
        gc.collect()  # a model in memory holds itself; it must be gone before blocks are read

    def _keep_survey(
        self, key: dict[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        model = self.fetched.contents["model"]
        subject = measured_on(self.config, self.device, model, code_behind(*SURVEY_CODE))
        return kept_tensors("surveys", {**subject, **key}, make)


@dataclass(frozen=True)
class Step:
    """How a stage is run.  found: whether an earlier try has left its work."""

    run: Callable[[Job], None]
    found: Callable[[Job], bool] = lambda _: False


STEPS = {  # by the name of the stage
    stages.LOAD.name: Step(Job.load),
    stages.EVALUATE_ORIGINAL.name: Step(Job.evaluate_original),
    stages.WEIGH.name: Step(Job.weigh),
    stages.ALLOCATE.name: Step(Job.allocate, Job.allocated),
    stages.QUANTIZE.name: Step(Job.quantize),
    stages.EVALUATE_AFTER_QUANTIZE.name: Step(Job.evaluate_after_quantize),
    stages.ACTIVATIONS.name: Step(Job.observe_activations, Job.exported),
    stages.EXPORT.name: Step(Job.export, Job.exported),
    stages.EVALUATE_QUANTIZED.name: Step(Job.evaluate_quantized),
}
