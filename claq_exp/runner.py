"""One experiment from config to results."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from claq_exp import __version__
from claq_exp.allocate.model import allocate_model
from claq_exp.allocate.plans_file import load_plans, save_plans
from claq_exp.assist import Quantization
from claq_exp.calibration.streams import HiddenForm
from claq_exp.checkpoint.reader import read_layouts
from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import checkpoint_sizes, write_checkpoint
from claq_exp.config import ExperimentConfig
from claq_exp.distributed import ALONE, Ranks
from claq_exp.errors import telling_line
from claq_exp.evaluation.caveats import tell_caveats
from claq_exp.evaluation.divergence import Comparison
from claq_exp.evaluation.measure import Measurement
from claq_exp.fallbacks import count_fallbacks
from claq_exp.heap import return_at_once
from claq_exp.inputs import Fetched, Tokens, fetch, tokenize_inputs
from claq_exp.interruption import Interruption, graceful
from claq_exp.machine import choose_device, settle, versions
from claq_exp.measuring import Bench, activation_bits, measured_on
from claq_exp.models.activations import observe_inputs
from claq_exp.models.dispatch import loaded
from claq_exp.models.load import forward_dtype, look_at, open_model, stored_dtype
from claq_exp.models.original import Original, check_strictly
from claq_exp.models.quantize import QUANTIZE, Watcher, quantize_model
from claq_exp.models.stream import StreamedModel
from claq_exp.models.towers import text_config
from claq_exp.needs import check_needs
from claq_exp.plan import HIDDEN_SHARE, Plan, make_plan
from claq_exp.quantize.activation.rounding import Rounding, needs_text, settle_rounding
from claq_exp.quantize.allocation import MatrixPlan
from claq_exp.reporting.results import build_results, text_rows, write_layers
from claq_exp.resources import free_memory, peak_memory, reset_peak
from claq_exp.run_folder import (
    EVENTS_FILE,
    LAYERS_FILE,
    PICTURE_FILE,
    RunFolder,
    run_identity,
)
from claq_exp.sources.cache import fetch_log
from claq_exp.sources.code import code_behind
from claq_exp.sources.kept import kept_tensors
from claq_exp.sources.model import weight_bytes
from claq_exp.tracking.events import EventLog
from claq_exp.tracking.progress import RunProgress, noise_to
from claq_exp.tracking.wandb import WandbTracker

ALLOCATION = "allocation.safetensors"
CONVERTED = "converted"
SURVEY_CODE = ("claq_exp.allocate.survey", "claq_exp.models.load")


@dataclass(frozen=True)
class Outcome:
    """What a run left behind; `found` tells a run that was already finished."""

    folder: Path
    results: dict[str, Any]
    found: bool
    notes: tuple[str, ...] = ()


def run(
    config: ExperimentConfig,
    command: str,
    say: Callable[[str], None] = lambda _: None,
    *,
    progress: Callable[[dict[str, float]], RunProgress] = RunProgress,
    wait: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run an experiment, or continue it, or find it finished.

    command: what a person typed, for the record.  say: shows a line while no progress bar is up,
    on a stream of its own: standard error goes to a log now and then.
    progress: makes the progress bar from estimates.  wait: for another process that has the same
    run, where this would raise else.  ranks: of which this is the first, and the others `assist`.
    """
    device = choose_device(config.device)
    settle(config.seed, config.threads)
    with noise_to(fetch_log()):
        fetched = fetch(config, say=say)
    remote = config.model.trust_remote_code
    original = look_at(fetched.model, trust_remote_code=remote, strict=config.strict)
    config = config.with_dtype(forward_dtype(config.model.dtype, original.config, device))
    identity = run_identity(config, fetched.contents, __version__)
    folder = RunFolder.of(config, identity)
    finished = folder.results()
    if finished is not None and config.resume != "never":
        return Outcome(folder.path, finished, found=True)
    plan = make_plan(config, original.config, device)
    if config.check_resources:
        check_needs(plan.needs, device, folder.path.parent)
    with noise_to(fetch_log()):
        tokens = tokenize_inputs(config, fetched.model, fetched.contents)
    with folder.locked(wait=wait):
        finished = folder.results()  # another process may have been first
        if finished is not None and config.resume != "never":
            return Outcome(folder.path, finished, found=True)
        with folder.recorded():
            folder.prepare(config.resume, identity)
            bits = f"{plan.sizes.nominal:.2f} nominal / {plan.sizes.linear:.2f} linear bits planned"
            say(f"{bits}; {folder.path}")
            folder.write_settings(command, identity)
            tracker = _tracker(config, folder, say)
            with (
                graceful() as interruption,
                progress(plan.seconds) as bar,
                noise_to(folder.path / "third_party.log"),
                EventLog(folder.path / EVENTS_FILE, [tracker] if tracker else []) as events,
            ):
                inputs = (fetched, original, tokens)
                job = _Job(config, folder, *inputs, plan, device, bar, events, ranks, interruption)
                results = job.results(command)
                tell_caveats(results, events.event, strict=config.strict)
                events.results(results)
                events.event("finished", seconds=results["run"]["seconds"])
            folder.write_results(results)
        shutil.rmtree(folder.work, ignore_errors=True)
        notes = [tracker.failure] if tracker and tracker.failure else []
        return Outcome(folder.path, results, found=False, notes=(*notes, *job.notes))


def _tracker(
    config: ExperimentConfig, folder: RunFolder, say: Callable[[str], None]
) -> WandbTracker | None:
    if config.tracking.name == "none":
        return None
    tracker = WandbTracker(config.tracking, folder.path, folder.path.name, config.as_dict())
    if tracker.failure:
        say(tracker.failure)
    return tracker


@dataclass
class _Job:
    """The stages of one run; each leaves in the folder what the same command need not do again."""

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
        started = datetime.now(UTC)
        self.events.event("started", run=self.folder.path.name, versions=versions())
        for text, row in text_rows(self.tokens.text_losses).items():
            if any(row.values()):
                self.events.event("text", text=text, **row)
        original, report = self._quantize()
        gc.collect()  # the original model must be gone before the checkpoint is loaded
        comparison = Comparison(self.bench.original_logits())
        quantized = self._stage(
            "evaluate quantized", lambda: self.bench.measure_checkpoint(comparison)
        )
        kl = comparison.results()
        for name, row in kl.items():
            self.events.event(
                "kl",
                dataset=name,
                model="quantized",
                value=row.mean,
                top1_agreement=row.top1_agreement,
                tokens=row.tokens,
            )
        layouts = read_layouts(self.folder.checkpoint)
        self._plot(report)
        return build_results(
            config=self.config,
            hash_=self.folder.hash,
            command=command,
            started=started,
            device=self.device,
            sizes=checkpoint_sizes(self.folder.checkpoint, layouts, self.plan.parameters),
            activation_bits=activation_bits(self.folder.checkpoint, layouts),
            original_bytes=weight_bytes(self.fetched.model),
            corpora=self.tokens.corpora,
            losses=self.tokens.text_losses,
            original=original,
            quantized=quantized,
            kl=kl,
            spent=self.events.spent(),
            report=report,
            source=self.source,
        )

    def _quantize(self) -> tuple[Measurement, list[dict[str, Any]]]:
        """Measure the original, quantize it and write the checkpoint; return its report rows."""
        config = self.config
        model = self._stage("load", lambda: self._open_original(found=self._note_source))
        original = self._stage(
            "evaluate original",
            lambda: self.bench.measure_original(
                model, lambda: loaded(self._open_original(check=False), config.device_map)
            ),
        )
        batches = list(self.tokens.calibration.split(config.calibration.batch_size))
        plans = self._allocate(batches)
        store = BlockStore(self.folder.work / "blocks", self._store_identity())
        store.open(self._note_damage)
        self.progress.stage("quantize")
        return_at_once()
        reset_peak()
        converted, hidden_form = self.folder.work / CONVERTED, self._hidden_form()
        transform, tune = config.rewriting(), config.tuning()
        others = (batches, self.plan.recipe, store.follower(), plans, hidden_form, transform, tune)
        self.ranks.tell(Quantization(config, self.fetched.model, converted, *others))
        watcher = Watcher(
            event=self._quantize_event,
            share=self.progress.advance,
            stopping=lambda: self.interruption.asked,
        )
        with self.interruption.finishing():
            quantize_model(
                model,
                batches,
                self.plan.recipe,
                store,
                plans=plans,
                hidden_form=hidden_form,
                transform=transform,
                tune=tune,
                watcher=watcher,
                strict=config.strict,
                ranks=self.ranks,
            )
        report = store.report(QUANTIZE)
        write_layers(self.folder.path / LAYERS_FILE, report)
        if (counts := count_fallbacks(report))["layers"]:
            self.events.event("fallbacks", **counts)
        if not self.folder.checkpoint.is_dir():
            rounding = self._settle_rounding(batches, store)
            self._stage("export", lambda: self._export(model, store, rounding))
        return original, report

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
        self, *, check: bool = True, found: Callable[[Original], None] = lambda _: None
    ) -> StreamedModel:
        model = self.config.model
        return open_model(
            self.fetched.model,
            self.folder.work / CONVERTED,
            dtype=model.dtype,
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
        on_disk = self.plan.hidden_bytes > HIDDEN_SHARE * free_memory(self.device)
        return HiddenForm(self.plan.hidden_dtype, on_disk)

    def _quantize_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "block":
            data = {**data, "peak_memory_bytes": peak_memory()}
            reset_peak()
        self.events.event(name, **data)

    def _settle_rounding(self, batches: list[Tensor], store: BlockStore) -> Rounding | None:
        """Settle how activations are rounded; some rules look at those of the original model."""
        rule = self.config.activation_rule()
        if not needs_text(rule):
            return settle_rounding(rule, None)
        opened, names = self._open_original(check=False), list(self.plan.layouts)
        opened.overlay.update(store.dense())
        return self._stage(
            "activations",
            lambda: settle_rounding(
                rule, observe_inputs(opened, batches, names, self.progress.advance)
            ),
        )

    def _export(self, model: StreamedModel, store: BlockStore, rounding: Rounding | None) -> None:
        write_checkpoint(
            self.folder.checkpoint,
            model.model,
            self.tokens.tokenizer,
            store.packed(),
            stored_dtype(self.source.config),
            source=self.fetched.model,
            read=model.read,
            rounding=rounding,
        )

    def _allocate(self, batches: list[Tensor]) -> dict[str, MatrixPlan]:
        """Decide on every matrix at once, where there is an allocation that does."""
        allocation, path = self.plan.allocation, self.folder.work / ALLOCATION
        if allocation.survey() is None:
            return {}
        if path.is_file():
            return load_plans(path)
        self.progress.stage("allocate")
        plans = self._stage(
            "allocate",
            lambda: allocate_model(
                self._open_original(check=False).load(),
                [batch.to(self.device) for batch in batches],
                self.plan.recipe,
                allocation,
                blocks_path=self.config.model.blocks,
                overhead=self.plan.description,
                keep=self._keep_survey,
                on_share=self.progress.advance,
            ),
        )
        save_plans(path, plans)
        return plans

    def _keep_survey(
        self, key: dict[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        model = self.fetched.contents["model"]
        subject = measured_on(self.config, self.device, model, code_behind(*SURVEY_CODE))
        return kept_tensors("surveys", {**subject, **key}, make)

    def _stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a stage's work under its name in the progress bar, and note what it took."""
        self.progress.stage(name)
        reset_peak()
        started = time.perf_counter()
        result = work()
        spent = {name.partition(" ")[0]: round(time.perf_counter() - started, 3)}
        self.events.event("stage", stage=name, peak_memory_bytes=peak_memory(), **spent)
        return result
