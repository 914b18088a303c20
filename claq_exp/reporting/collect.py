"""Finds runs below folders, whatever has become of them, and what they measured."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.evaluation.zero_shot import is_accuracy
from claq_exp.reporting.external import as_run, is_external
from claq_exp.reporting.older import current
from claq_exp.reporting.overrides import agree
from claq_exp.run_folder import (
    EVENTS_FILE,
    FAILED,
    FINISHED,
    LAYERS_FILE,
    RESULTS_FILE,
    SCHEMA,
    STATE_FILE,
    WINDOWS_FILE,
    RunState,
    run_state,
    settings_file,
)
from claq_exp.run_folder.jobs import JOBS, Job, read_jobs
from claq_exp.run_folder.layers import LAYER_FIELDS
from claq_exp.run_folder.windows import Windows, read_windows
from claq_exp.system.files import read_json

ORIGINAL_BITS = 16.0
NUMBER_STARTS = frozenset("0123456789+-.ni")  # nan and inf are numbers too
RUN_FILES = {RESULTS_FILE, STATE_FILE, EVENTS_FILE}
INSIDE = {"checkpoint", "work", "wandb"}  # of a run: no runs in there
PARTS = ("run", "config", "bits", "size", "perplexity", "zero_shot")  # of every results.json
# of the rows of a measure, what is no number; the metrics of a task are numbers by name
OTHERS = {"tokens_sha256", "requests_sha256", "bos", "metric", "metrics"}


@dataclass(frozen=True)
class Run:
    """A run, or a job of a sweep that failed before it had a folder.

    folder: its run folder, or None.  state: how it stands.  config: its settings; where it is not
    finished, without those that change no result, and empty without a folder.  results: content of
    results.json, or None where it is not finished.  overrides: what a sweep gave it.
    together: it is one of several seeds that one word, `seeds=`, has run.
    """

    folder: Path | None
    state: RunState
    config: dict[str, Any]
    results: dict[str, Any] | None = None
    overrides: tuple[str, ...] = ()
    together: bool = False

    @property
    def name(self) -> str:
        """What tells the run from others: its folder's name, or its overrides."""
        return self.folder.name if self.folder else " ".join(self.overrides)

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """Everything that a finished run measured, by key; nothing for another."""
        if self.results is None:
            return {}
        results = self.results
        found = [*_costs(results), *_perplexities(results), *_scores(results)]
        found += _after(results, {measure.key: measure for measure in found})
        return {measure.key: measure for measure in found}

    @cached_property
    def layers(self) -> list[dict[str, Any]]:
        """The rows of layers.csv with numbers as numbers, None for what is missing.

        None of them where the file is missing or damaged.
        """
        path = self.folder / LAYERS_FILE if self.folder else None
        if path is None or not path.is_file():
            return []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [_layer(row) for row in csv.DictReader(file)]
        except (csv.Error, ValueError):
            return []
        return rows

    @cached_property
    def windows(self) -> dict[str, Windows]:
        """What each evaluation window adds, by corpus; nothing where the file is missing, as in
        older runs, or damaged.
        """
        try:
            return read_windows(self.folder / WINDOWS_FILE) if self.folder else {}
        except CheckpointError:
            return {}

    @property
    def block_layers(self) -> list[dict[str, Any]]:
        """The rows of the layers of blocks, without embedding and head."""
        return [row for row in self.layers if row.get("block") is not None]


@dataclass(frozen=True)
class Measure:
    """A number of a run that reports compare.

    kind: bits, size, perplexity, kl, accuracy, score (of a task that has no accuracy), average,
    time or memory.  name: corpus, task or account.  label: a heading, with the unit.
    quantized, original: values in the label's unit; None where they were not measured.
    stderr: of `quantized`, where known.  better: lower, higher, or empty.  digits: decimals.
    content: what it was measured on, `AMOUNT:HASH`; numbers of another amount or hash do not
    compare.  Older results have no hash.
    """

    kind: str
    name: str
    label: str
    quantized: float | None
    original: float | None = None
    stderr: float | None = None
    better: str = "lower"
    digits: int = 2
    content: str = ""

    @property
    def key(self) -> str:
        """`kind.name`, as a person names it on the command line."""
        return f"{self.kind}.{self.name}"


@dataclass(frozen=True)
class Collection:
    """Runs of one or more folders, and notes on what could not be read."""

    runs: list[Run]
    notes: list[str]

    @property
    def finished(self) -> list[Run]:
        """The runs that have results."""
        return [run for run in self.runs if run.results is not None]


def collect(folders: Sequence[Path]) -> Collection:
    """Return all runs below folders, finished or not, each once.

    Finished ones come first, by model and linear bits.  Results of a newer schema, of
    `claq-exp evaluate` on a checkpoint of this project (they know no recipe), or that cannot be
    read, are left out with a note.  What others made is shown beside the runs.
    Raises ConfigError when a folder does not exist, or when there is no run below any.
    """
    found: dict[Path, Run] = {}
    sweeps: dict[Path, list[Job]] = {}
    notes: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"report: '{folder}' is no folder")
        for place, names in _walk(folder):
            own = place.resolve()
            try:
                if own not in found and names & RUN_FILES:
                    found[own] = read_run(place)
            except CheckpointError as error:
                notes.append(f"Left out: {error}.")
            if JOBS in names and sweeps.keys().isdisjoint([own, *own.parents]):
                sweeps[own] = read_jobs(place)  # records further down are of single calls
    for place, jobs in sweeps.items():
        _join_seeds(place, jobs, found)
    failed = [run for place, jobs in sweeps.items() for run in _failed_jobs(place, jobs, found)]
    if not found and not failed:
        where = ", ".join(f"'{folder}'" for folder in folders)
        raise ConfigError(" ".join([f"report: no finished run below {where}.", *notes]).rstrip("."))
    return Collection(sorted([*found.values(), *failed], key=_order), notes)


def is_run_folder(folder: Path) -> bool:
    """Tell whether a folder is that of a run, finished or not."""
    return any((folder / name).is_file() for name in RUN_FILES)


def read_run(folder: Path) -> Run:
    """Return the run of a folder.

    Raises ConfigError when it holds none, CheckpointError for results that cannot be shown: of a
    newer schema, of `claq-exp evaluate` (they know no recipe), or damaged.
    """
    if not is_run_folder(folder):
        raise ConfigError(f"report: '{folder}' is no run folder, there is no {RESULTS_FILE} in it")
    state = run_state(folder) or RunState("unknown", f"{STATE_FILE} is missing or damaged")
    if state.name != FINISHED:
        path = settings_file(folder)
        config = read_json(path).get("config", {}) if path.is_file() else {}
        return Run(folder, state, current(config))
    results = read_json(folder / RESULTS_FILE)
    schema = results.get("schema", 0)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise CheckpointError(f"{folder} holds results of schema {schema}; update claq_exp")
    if is_external(results):
        try:
            results = as_run(results)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / RESULTS_FILE} is damaged: {error!r}") from error
    elif results.get("status") != FINISHED:
        raise CheckpointError(f"{folder} holds no run but results that are {results.get('status')}")
    if missing := [part for part in PARTS if not isinstance(results.get(part), dict)]:
        raise CheckpointError(f"{folder / RESULTS_FILE} has no '{missing[0]}'")
    run = Run(folder, state, current(results["config"]), results)
    try:
        _check_numbers(run)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / RESULTS_FILE} is damaged: {error!r}") from error
    return run


def _check_numbers(run: Run) -> None:
    """Read all that is shown; raises a TypeError, or what comes of it, where it is of no use."""
    for part in ("model", "codebook", "precision", "reservation", "solver"):
        if not isinstance(lookup(run.config, f"{part}.name"), str):
            raise TypeError(f"config.{part}.name is no text")
    results = run.results or {}
    tables = {"ledger": results["bits"].get("ledger", {}), "timings": results.get("timings", {})}
    for stage, row in results.get("after", {}).items():
        tables.update({f"after.{stage}.{p}": row[p] for p in ("perplexity", "kl", "zero_shot")})
    for part in ("perplexity", "kl", "zero_shot"):
        tables.update({f"{part}.{name}": row for name, row in results.get(part, {}).items()})
    for name, row in results.get("zero_shot", {}).items():
        tables[f"zero_shot.{name}.metrics"] = row.get("metrics", {})
    for place, row in tables.items():
        for key, value in row.items():
            if key not in OTHERS and not isinstance(value, int | float | None):
                raise TypeError(f"{place}.{key} is no number")
    for key, measure in run.measures.items():
        for value in (measure.quantized, measure.original, measure.stderr):
            if not isinstance(value, int | float | None):
                raise TypeError(f"{key} is no number")


def _layer(row: dict[str, str]) -> dict[str, Any]:
    """Return a row of layers.csv as values.  Raises ValueError for one that is damaged."""
    if "name" not in row or None in row or None in row.values():
        raise ValueError("a row has other columns than the table")
    values = {key: _value(text) for key, text in row.items()}
    for key in {*LAYER_FIELDS} - {"name"}:
        if isinstance(values.get(key), str):
            raise ValueError(f"{key} is no number")
    return values


def lookup(config: Any, key: str) -> Any:
    """Return the value at a dotted key, or None."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _join_seeds(place: Path, jobs: Sequence[Job], found: dict[Path, Run]) -> None:
    """Mark the runs of the jobs that `seeds=` made."""
    for job in jobs:
        folder = place / job.folder if job.seeds and job.folder else None
        if folder in found:
            found[folder] = replace(found[folder], together=True)


def _failed_jobs(place: Path, jobs: Sequence[Job], found: dict[Path, Run]) -> list[Run]:
    """Return the jobs that did not get as far as a folder; give the others' runs their overrides.

    A record names the folder of a finished job alone: an unfinished run beside it is that of a job
    where state and settings agree.
    """
    failed = []
    for job in jobs:
        if job.folder is not None or job.state.name == FINISHED:
            continue
        for folder, run in found.items():
            if folder.parent == place and not run.overrides and _is_of_job(run, job):
                found[folder] = replace(run, overrides=job.overrides, state=job.state)
                break
        else:
            failed.append(Run(None, job.state, {}, overrides=job.overrides))
    return failed


def _is_of_job(run: Run, job: Job) -> bool:
    alike = run.results is None and run.state.name == job.state.name
    if job.state.name == FAILED and run.state.reason != job.state.reason:
        return False
    return alike and agree(job.overrides, run.config)


def _walk(folder: Path) -> Iterator[tuple[Path, set[str]]]:
    """Go through the folders below one, itself first, with the names in each; not hidden ones."""
    for root, below, files in os.walk(folder):
        names = {*below, *files}
        inside = INSIDE if names & RUN_FILES else set()
        below[:] = sorted(name for name in below if name not in inside and name[0] != ".")
        yield Path(root), names


def _order(run: Run) -> tuple[bool, str, float, str]:
    if run.results is None:
        return True, "", 0.0, run.name
    return False, run.config["model"]["name"], run.results["bits"]["linear"], run.name


def _costs(results: dict[str, Any]) -> Iterator[Measure]:
    bits, size = results["bits"], results["size"]
    original_bits = dict.fromkeys(("linear", "nominal"), ORIGINAL_BITS)
    original_bits["model"] = size["original_bytes"] / size["checkpoint_bytes"] * bits["model"]
    for name in ("linear", "nominal", "model"):
        yield Measure("bits", name, f"{name} bits", bits[name], original_bits[name])
    rounded = bits.get("activation") or ORIGINAL_BITS
    yield Measure("bits", "activation", "activation bits", rounded, ORIGINAL_BITS)
    before, after = size["original_bytes"] / 1e6, size["checkpoint_bytes"] / 1e6
    yield Measure("size", "checkpoint", "checkpoint, MB", after, before, digits=1)
    seconds = {"total": results["run"].get("seconds"), **results.get("timings", {})}
    for name, value in seconds.items():
        yield Measure("time", name, f"{name}, s", value, digits=1)
    peak = results.get("peak_memory_bytes")
    gigabytes = None if peak is None else peak / 2**30
    yield Measure("memory", "peak", "peak memory, GiB", gigabytes)


def _perplexities(results: dict[str, Any]) -> Iterator[Measure]:
    for name, row in results["perplexity"].items():
        yield Measure(
            "perplexity",
            name,
            f"{name} perplexity",
            row["quantized"],
            row["original"],
            content=f"{row['tokens']}:{row.get('tokens_sha256') or ''}",
        )
    for name, row in results.get("kl", {}).items():
        content = f"{row['tokens']}:"  # the first so many of the corpus
        yield Measure("kl", name, f"{name} KL", row["mean"], 0.0, digits=3, content=content)


def _scores(results: dict[str, Any]) -> Iterator[Measure]:
    for name, row in results["zero_shot"].items():
        accuracy = is_accuracy(row["metric"])
        factor, unit = (100.0, ", %") if accuracy else (1.0, "")
        yield Measure(
            "accuracy" if accuracy else "score",
            name,
            f"{name} {row['metric']}{unit}",
            quantized=_times(factor, row["quantized"]),
            original=_times(factor, row["original"]),
            stderr=_times(factor, row.get("stderr")),
            better="higher" if accuracy else "lower" if "perplexity" in row["metric"] else "",
            digits=1 if accuracy else 2,
            content=f"{row['rows']} by {row['metric']}:{row.get('requests_sha256') or ''}",
        )
    if average := results.get("average_accuracy"):
        yield Measure(
            "average",
            "accuracy",
            "average accuracy, %",
            quantized=_times(100.0, average["quantized"]),
            original=_times(100.0, average["original"]),
            better="higher",
            digits=1,
            content=f"{' '.join(sorted(_with_accuracy(results)))}:",
        )


def _after(results: dict[str, Any], found: dict[str, Measure]) -> Iterator[Measure]:
    """Yield the measures of the model as it stood after a stage, named beside those of the end."""
    for stage, row in results.get("after", {}).items():
        values = {("average", "accuracy"): row["average_accuracy"]}
        for part in ("perplexity", "kl", "zero_shot"):
            kinds = ("accuracy", "score") if part == "zero_shot" else (part,)
            values |= {(kind, n): value for kind in kinds for n, value in row[part].items()}
        for (kind, name), value in values.items():
            end = found.get(f"{kind}.{name}")
            if end is not None:
                shown = _times(100.0 if kind in ("accuracy", "average") else 1.0, value)
                label = f"{end.label}, after {stage}"
                then = replace(end, name=f"{name}_after_{stage}", label=label, stderr=None)
                yield replace(then, quantized=shown)


def _with_accuracy(results: dict[str, Any]) -> list[str]:
    tasks = results["zero_shot"].items()
    return [name for name, row in tasks if is_accuracy(row["metric"])]


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _value(text: str) -> Any:
    if not text or text[0] not in NUMBER_STARTS:
        return text or None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
