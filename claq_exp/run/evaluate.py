"""Measures a checkpoint that exists, and its original where that is known."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from claq_exp.checkpoint.reader import read_layouts
from claq_exp.checkpoint.writer import checkpoint_sizes
from claq_exp.config import ExperimentConfig, ModelConfig
from claq_exp.errors import ClaqError, ConfigError
from claq_exp.evaluation.caveats import caveats, refuse
from claq_exp.evaluation.divergence import Comparison, Divergence
from claq_exp.evaluation.measure import Measurement
from claq_exp.evaluation.perplexity import Corpus
from claq_exp.evaluation.tasks import check_tasks, task_content
from claq_exp.foreign.found import Foreign, check_package, find_foreign
from claq_exp.foreign.ledger import ForeignLedger, check_whole, read_ledger
from claq_exp.foreign.load import find_tokenizer, model_files
from claq_exp.foreign.owners import model_config as foreign_config
from claq_exp.models.context import check_context
from claq_exp.models.dispatch import loaded
from claq_exp.models.load import DTYPES, forward_dtype, load_config, load_tokenizer, open_model
from claq_exp.models.skeleton import dense_parameter_count
from claq_exp.models.source import fingerprint, model_folder, source_name, weight_bytes
from claq_exp.models.stream import StreamedModel
from claq_exp.models.towers import text_config
from claq_exp.quantize.stale_kernels import drop_stale_kernels
from claq_exp.run.inputs import corpus_losses, corpus_windows
from claq_exp.run.measuring import Bench, activation_bits
from claq_exp.run.needs import GIB, wants_stream
from claq_exp.run.origin import Origin, recorded_origin
from claq_exp.run.results import (
    average_row,
    kl_rows,
    perplexity_rows,
    text_rows,
    window_rows,
    zero_shot_rows,
)
from claq_exp.run.stages import EVALUATE_ORIGINAL, EVALUATE_QUANTIZED
from claq_exp.run_folder import WINDOWS_FILE
from claq_exp.run_folder.find import checkpoint_folder
from claq_exp.run_folder.windows import write_windows
from claq_exp.sources.cache import fetch_log
from claq_exp.system.files import write_json
from claq_exp.system.machine import choose_device, device_name, git_commit, settle, versions
from claq_exp.system.resources import free_memory
from claq_exp.tracking.progress import RunProgress, noise_to

EXTERNAL = "external"  # results of what others made
EACH = 60.0  # seconds of a measurement: that both are of the same length, about, is what counts


@dataclass(frozen=True)
class Evaluated:
    """What was measured, the file that holds it, and what a person must know of it."""

    results: dict[str, Any]
    path: Path
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Subject:
    """A checkpoint and all that it is measured on.

    config: its `model.dtype` is settled.  tasks: task -> hash of all that defines its score.
    parameters: of the model, tied ones once.  streams: models are read block by block.
    foreign: the checkpoint and its ledger, where another owner made it.
    """

    config: ExperimentConfig
    folder: Path
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    corpora: Mapping[str, Corpus]
    tasks: Mapping[str, str]
    device: str
    parameters: int
    streams: bool
    foreign: tuple[Foreign, ForeignLedger] | None = None

    @property
    def path(self) -> Path:
        """What a person named: a folder, or a GGUF file."""
        return self.foreign[0].path if self.foreign else self.folder

    @property
    def content(self) -> str:
        """A hash of the checkpoint's files."""
        return self.foreign[0].content() if self.foreign else fingerprint(self.folder)

    @property
    def whole(self) -> int:
        """Bytes of the model in the type of its forward passes."""
        return self.parameters * DTYPES[self.config.model.dtype].itemsize


@dataclass(frozen=True)
class _Original:
    """The model that a checkpoint is compared with.

    content: hash of its files.  quantized: it is the one that the checkpoint was made of.
    """

    model: ModelConfig
    folder: Path
    content: str
    quantized: bool


def evaluate_checkpoint(
    config: ExperimentConfig, command: str, *, named: bool = False
) -> Evaluated:
    """Measure `config.checkpoint` on `config.evaluation`, and its original where it is known.

    named: `config.model` is the original; else the folder of the checkpoint's run tells.
    Raises ConfigError without a checkpoint, and for an original of another kind than it,
    CheckpointError for a damaged checkpoint.
    """
    subject = _prepare(config, named=named)
    with noise_to(fetch_log()):
        original, note = _find_original(subject, named=named)
    settings = {
        "checkpoint": str(subject.path.resolve()),
        "original": {"source": original.model.source, "sha256": original.content}
        if original
        else None,
        "dtype": subject.config.model.dtype,
        "evaluation": {k: v for k, v in asdict(config.evaluation).items() if k != "after"},
        "runtime": asdict(config.runtime),
    }
    target = Path(config.outputs).expanduser() / config.name / _folder_name(subject, settings)
    target.mkdir(parents=True, exist_ok=True)
    before, after, kl = _measure(subject, original, target)
    results = {
        "schema": 1,
        "status": "evaluated",
        "run": {
            "command": command,
            "device": device_name(subject.device),
            "versions": versions(),
            "git": git_commit(),
        },
        **settings,
        **_external(subject, original),
        **_sizes(subject, original),
        "texts": text_rows(corpus_losses(subject.corpora)),
        "perplexity": perplexity_rows(subject.corpora, before, after),
        "kl": kl_rows(kl),
        "zero_shot": zero_shot_rows(before, after),
        "average_accuracy": average_row(before, after),
    }
    if config.strict:
        refuse(caveats(results))
    write_windows(target / WINDOWS_FILE, window_rows(subject.corpora, before, after, kl))
    write_json(target / "results.json", results)
    shutil.rmtree(target / "work")  # the next time measures again
    return Evaluated(results, target / "results.json", (note,) if note else ())


def _prepare(config: ExperimentConfig, *, named: bool) -> _Subject:
    """Check what is asked for, and read all that the checkpoint is measured on."""
    if config.checkpoint is None:
        raise ConfigError(
            "evaluate needs checkpoint=FOLDER, e.g. checkpoint=outputs/default/RUN/checkpoint"
        )
    remote = config.model.trust_remote_code
    foreign = find_foreign(config.checkpoint)
    folder = checkpoint_folder(config.checkpoint) if foreign is None else foreign.path
    device = choose_device(config.device)
    drop_stale_kernels()
    settle(config.seed, config.threads)
    tasks = config.evaluation.zero_shot
    with noise_to(fetch_log()):
        check_tasks(tasks)
        contents = {name: task_content(name, task) for name, task in tasks.items()}
        if foreign is None:
            ledger, model_config = None, load_config(folder, trust_remote_code=remote)
            parameters = dense_parameter_count(model_config)
        else:
            check_package(foreign)
            ledger = read_ledger(foreign, trust_remote_code=remote)
            model_config = foreign_config(foreign, trust_remote_code=remote)
            parameters = ledger.parameters
            if foreign.is_gguf:
                check_whole(foreign, ledger)
        config = config.with_dtype(forward_dtype(config.model.dtype, model_config, device))
        whole = parameters * DTYPES[config.model.dtype].itemsize
        if foreign is None:
            tokenizer = load_tokenizer(folder, trust_remote_code=remote)
        else:
            _check_fits(config, foreign, whole, device)
            folder, original = model_files(foreign), config.model if named else None
            tokenizer = find_tokenizer(foreign, folder, original, trust_remote_code=remote)
        corpora = corpus_windows(config, tokenizer, model_config)
    streams = wants_stream(config.stream_choice(), whole, device, tasks=bool(tasks))
    read = (folder, model_config, tokenizer, corpora, contents)
    others = (foreign, ledger) if foreign is not None and ledger is not None else None
    return _Subject(config, *read, device, parameters, streams, others)


def _check_fits(config: ExperimentConfig, foreign: Foreign, whole: int, device: str) -> None:
    """Raise ConfigError for a checkpoint of another owner that memory does not hold."""
    free = free_memory(device)
    if config.check_resources and config.device_map is None and whole > free:
        raise ConfigError(
            f"{foreign.path} is loaded whole, about {whole / GIB:.1f} GiB, and {free / GIB:.1f} "
            "GiB are free; device_map=auto spreads it, check_resources=false tries it"
        )


def _find_original(subject: _Subject, *, named: bool) -> tuple[_Original | None, str]:
    """Return the model to compare with, or None, and a line about it, or an empty one."""
    if not subject.config.original:
        return None, ""
    recorded = recorded_origin(subject.folder)
    if named:
        return _named_original(subject, recorded)
    try:
        return _recorded_original(subject, recorded), ""
    except ClaqError as error:
        return None, f"the original is left out: {error}"


def _named_original(subject: _Subject, recorded: Origin | None) -> tuple[_Original, str]:
    """Return the model of the command line, and a line where it is not the quantized one."""
    original = _original(subject, subject.config.model, recorded)
    config = load_config(original.folder, trust_remote_code=original.model.trust_remote_code)
    own, other = (text_config(c).vocab_size for c in (subject.model_config, config))
    if own != other:
        raise ConfigError(
            f"model.source '{original.model.source}' has a vocabulary of {other}, the checkpoint "
            f"one of {own}; give the model that was quantized"
        )
    for corpus in subject.corpora.values():
        check_context("evaluation.context", corpus.windows.shape[1], config)
    if recorded is None or original.quantized:
        return original, ""
    return original, f"{original.model.source} is not the model that was quantized"


def _recorded_original(subject: _Subject, recorded: Origin | None) -> _Original:
    """Return the model that was quantized.  Raises ClaqError where it is not to be had."""
    if subject.foreign:
        raise ConfigError("a checkpoint that others made does not name it; model=... does")
    if recorded is None:
        raise ConfigError(
            f"it is not known, for {subject.folder} is not in the folder of its run; model=... "
            "names it"
        )
    original = _original(subject, recorded.model, recorded)
    if not original.quantized:
        raise ConfigError(
            f"the files of {recorded.model.source} are not those that were quantized; model=... "
            "compares with them all the same"
        )
    return original


def _original(subject: _Subject, model: ModelConfig, recorded: Origin | None) -> _Original:
    config = subject.config
    if not subject.streams and config.device_map is None and config.check_resources:
        free = free_memory(subject.device)
        if subject.whole > free:
            raise ConfigError(
                f"it takes about {subject.whole / GIB:.1f} GiB of memory, and {free / GIB:.1f} GiB "
                "are free; original=false does without it, check_resources=false tries it"
            )
    allowed = config.model.trust_remote_code
    model = replace(model, dtype=config.model.dtype, trust_remote_code=allowed)
    folder = model_folder(model)
    content = fingerprint(folder)
    same = recorded is not None and content == recorded.content
    return _Original(model, folder, content, quantized=same)


def _folder_name(subject: _Subject, settings: Mapping[str, Any]) -> str:
    """Name the folder of the results by all that they depend on."""
    identity = {
        **settings,
        "content": subject.content,
        "tokens": {name: corpus.content() for name, corpus in subject.corpora.items()},
        "tasks": dict(subject.tasks),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if subject.foreign:
        return f"{EXTERNAL}-{source_name(str(subject.path.resolve()))}-{digest[:8]}"
    return f"evaluation-{digest[:8]}"


def _measure(
    subject: _Subject, original: _Original | None, target: Path
) -> tuple[Measurement | None, Measurement, dict[str, Divergence]]:
    """Measure the original, if there is one, and the checkpoint; return their divergences too."""
    work = target / "work"
    work.mkdir(exist_ok=True)
    stages = (EVALUATE_ORIGINAL.name,) * bool(original) + (EVALUATE_QUANTIZED.name,)
    with RunProgress(dict.fromkeys(stages, EACH)) as progress, noise_to(target / "third_party.log"):
        bench = Bench(
            subject.config,
            subject.folder,
            work,
            original.content if original else "",
            subject.tasks,
            subject.tokenizer,
            subject.corpora,
            subject.device,
            vocabulary=text_config(subject.model_config).vocab_size,
            streams=subject.streams,
            on_event=lambda _kind, **_data: None,
            on_share=progress.advance,
            foreign=subject.foreign[0] if subject.foreign else None,
        )
        before, comparison = None, None
        if original is not None:
            progress.stage(EVALUATE_ORIGINAL.name)
            before = _measure_original(bench, original, work)
            gc.collect()  # it must be gone before the checkpoint is loaded
            comparison = Comparison(bench.original_logits())
        progress.stage(EVALUATE_QUANTIZED.name)
        after = bench.measure_checkpoint(comparison)
    return before, after, comparison.results() if comparison else {}


def _measure_original(bench: Bench, original: _Original, work: Path) -> Measurement:
    def opened(*, check: bool) -> StreamedModel:
        model = original.model
        return open_model(
            original.folder,
            work / "converted",
            dtype=model.dtype,
            device=bench.device,
            blocks_path=model.blocks,
            trust_remote_code=model.trust_remote_code,
            check=check,
        )

    return bench.measure_original(
        opened(check=not original.quantized),  # what was quantized has been checked
        lambda: loaded(opened(check=False), bench.config.device_map),
    )


def _sizes(subject: _Subject, original: _Original | None) -> dict[str, Any]:
    """Return the parts `bits` and `size` of the results."""
    before = weight_bytes(original.folder) if original else 2 * subject.parameters
    if subject.foreign:
        return _foreign_sizes(subject.foreign[1], before)
    folder, layouts = subject.folder, read_layouts(subject.folder)
    sizes = checkpoint_sizes(folder, layouts, subject.parameters)
    return {
        "bits": {
            "nominal": sizes.nominal,
            "linear": sizes.linear,
            "model": sizes.model,
            "activation": activation_bits(folder, layouts),
            "ledger": sizes.ledger.as_dict(),
        },
        "size": {"checkpoint_bytes": sizes.bytes, "original_bytes": before},
    }


def _foreign_sizes(ledger: ForeignLedger, before: int) -> dict[str, Any]:
    return {
        "bits": {
            "nominal": ledger.nominal,
            "linear": ledger.linear,
            "model": ledger.model,
            "activation": None,
            "ledger": dict(ledger.accounts),
        },
        "size": {"checkpoint_bytes": ledger.bytes, "original_bytes": before},
    }


def _external(subject: _Subject, original: _Original | None) -> dict[str, Any]:
    """Return the part `external` of the results: who made the checkpoint, and of which model."""
    if subject.foreign is None:
        return {}
    foreign, ledger = subject.foreign
    model = original.model if original else None
    return {
        EXTERNAL: {
            **foreign.about(),
            "form": ledger.main_kind() if foreign.is_gguf else "",
            "name": source_name(str(subject.path.resolve())),
            "model": {"name": model.name, "source": model.source} if model else None,
            "notes": ledger.notes(),
        }
    }
