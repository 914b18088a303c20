"""The folder of one run: found by what the run is, held by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from claq_exp.errors import CheckpointError, ClaqError, telling_line
from claq_exp.system.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from claq_exp.config import ExperimentConfig

NEUTRAL = (
    "tracking",
    "name",
    "outputs",
    "resume",
    "checkpoint",
    "original",
    "threads",
    "device_map",
    "stream",
    "check_resources",
    "embedding.required",
    "head.required",
)  # these change no result
LATER = {  # and what stands for nothing; a field before its group, which may go as a whole
    "allocation.tables": False,
    "allocation": {"name": "none"},
    "transform": {"name": "none"},
    "tune": {"name": "none"},
    "embedding": {"name": "none"},
    "head": {"name": "same"},
    "codebook.snap": "none",
    "codebook.snap_bits": 7,
    "evaluation.after": [],
    "solver.asymmetric": 0,
    "calibration.float64": False,
    "codebook.zero_point": "whole",
    "codebook.clip": "minmax",
    "objective": {"name": "plain"},
}
_ABSENT = object()
LOOK_SECONDS = 0.3  # in which `is_held` elsewhere lets go of a lock again
RESULTS_FILE = "results.json"
SCHEMA = 1  # of it
SETTINGS_FILE = "settings.json"
OLD_SETTINGS_FILE = "config.json"  # its name once: transformers took the folder for a model
CHECKPOINT = "checkpoint"
EVENTS_FILE = "events.jsonl"
LAYERS_FILE = "layers.csv"
WINDOWS_FILE = "windows.csv"
PICTURE_FILE = "layers.png"
STATE_FILE = "state.json"
LOCK_FILE = ".lock"
WORK = "work"
MODEL = "model.source"  # a run of another model is no near one
TOLD = 4  # differences; more would bury what matters
RUNNING, FINISHED, FAILED, INTERRUPTED, KILLED = (
    "running",
    "finished",
    "failed",
    "interrupted",
    "killed",
)


def run_identity(
    config: ExperimentConfig, contents: dict[str, str], version: str
) -> dict[str, Any]:
    """Return everything that changes a run's results.

    contents: hash of every input file.  version: of this package.  Settings that came later are
    left out where they change nothing, so that earlier runs are found.
    """
    settings = config.as_dict()
    for key in (*NEUTRAL, *LATER):
        *path, last = key.split(".")
        place = reduce(dict.__getitem__, path, settings)
        if key in NEUTRAL or place.get(last, _ABSENT) == LATER[key]:
            place.pop(last, None)
    return {"config": settings, "contents": contents, "version": version}


def unfinished_run_differs(folder: RunFolder, identity: dict[str, Any]) -> str:
    """Return what a request for `identity` has different from the nearest unfinished run.

    The nearest is that of the same model beside `folder` with the fewest differences; empty where
    there is none.
    """
    ours = _flat(identity)
    nearest: tuple[Path, list[str]] | None = None
    for work in sorted(folder.path.parent.glob(f"*/{WORK}")):
        path = settings_file(work.parent)
        with contextlib.suppress(CheckpointError):
            theirs = _flat({**read_json(path), "command": None})
            if theirs.get(MODEL) != ours.get(MODEL):
                continue
            keys = {*ours, *theirs} - {"command"}
            found = [key for key in sorted(keys) if ours.get(key) != theirs.get(key)]
            told = [_difference(key, ours.get(key), theirs.get(key)) for key in found]
            if nearest is None or len(told) < len(nearest[1]):
                nearest = path.parent, told
    if nearest is None:
        return ""
    place, told = nearest
    more = f", and {len(told) - TOLD} more" if len(told) > TOLD else ""
    return f"the nearest one is {place}, where {', '.join(told[:TOLD])}{more}"


def _flat(data: Any, key: str = "") -> dict[str, Any]:
    """Return dotted key -> value of nested dicts, settings without their `config.`."""
    if not isinstance(data, dict):
        return {key.removeprefix("config."): data}
    return {
        k: v
        for name, own in data.items()
        for k, v in _flat(own, f"{key}.{name}".strip(".")).items()
    }


def _difference(key: str, ours: Any, theirs: Any) -> str:
    if key.startswith("contents."):
        return f"the content of {key.removeprefix('contents.')} is another"
    return f"{key} is {_shown(theirs)} in place of {_shown(ours)}"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def settings_file(folder: Path) -> Path:
    """Return the file with the command and the settings of a run, whatever its name."""
    old = folder / OLD_SETTINGS_FILE
    named = folder / SETTINGS_FILE
    return old if old.is_file() and not named.is_file() else named


@dataclass(frozen=True)
class RunState:
    """How far a run has come.

    name: running, finished, failed (an error, which `reason` gives), interrupted (by a person or a
    scheduler), or killed (the process is gone without a word: by the system, for memory, with the
    machine).
    """

    name: str
    reason: str = ""


def run_state(folder: Path) -> RunState | None:
    """Return how far the run in a folder has come, or None where no run began."""
    if (folder / RESULTS_FILE).is_file():
        return RunState(FINISHED)
    try:
        written = read_json(folder / STATE_FILE)
        state = RunState(str(written["state"]), str(written.get("reason", "")))
    except (CheckpointError, KeyError):
        return None
    if state.name != RUNNING or is_held(folder / LOCK_FILE):
        return state
    return RunState(KILLED, str(written.get("process", "")))


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives.  `path` ends in the first eight digits of `hash`."""

    path: Path
    hash: str

    @staticmethod
    def of(config: ExperimentConfig, identity: dict[str, Any]) -> RunFolder:
        """Name the folder of a run."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        name = f"{config.model.name}-{config.recipe_name()}-{digest[:8]}"
        return RunFolder(Path(config.outputs).expanduser() / config.name / name, digest)

    @property
    def checkpoint(self) -> Path:
        """The packed checkpoint."""
        return self.path / CHECKPOINT

    @property
    def work(self) -> Path:
        """What an unfinished run has reached; gone once it is finished."""
        return self.path / WORK

    def results(self) -> dict[str, Any] | None:
        """Return the results of a finished run, or None."""
        path = self.path / RESULTS_FILE
        if not path.is_file():
            return None
        results = read_json(path)
        return results if results.get("status") == "finished" else None

    def prepare(self, resume: str, identity: dict[str, Any]) -> None:
        """Keep what an unfinished run left where it is to go on, and remove the rest.

        resume: as in `ExperimentConfig`.  Raises CheckpointError where nothing goes on and it must.
        """
        started = self.work.is_dir()
        if resume == "required" and not started:
            differs = unfinished_run_differs(self, identity)
            near = f"; {differs}" if differs else ""
            raise CheckpointError(f"resume=required, and {self.path} holds no unfinished run{near}")
        if resume == "never":
            (self.path / RESULTS_FILE).unlink(missing_ok=True)
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            shutil.rmtree(self.work, ignore_errors=True)
            started = False
        for unpublished in self.path.glob(f".{self.checkpoint.name}.*"):
            shutil.rmtree(unpublished, ignore_errors=True)  # a kill left it
        if not started:
            (self.path / EVENTS_FILE).unlink(missing_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    def write_settings(self, command: str, identity: dict[str, Any]) -> None:
        """Publish settings.json: what a person typed, and all that the run depends on."""
        write_json(self.path / SETTINGS_FILE, {"command": command, **identity})
        (self.path / OLD_SETTINGS_FILE).unlink(missing_ok=True)

    def write_results(self, results: dict[str, Any]) -> None:
        """Publish results.json."""
        write_json(self.path / RESULTS_FILE, results)

    @contextlib.contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[None]:
        """Hold the folder, and `wait` for it where another process has it.

        Raises ClaqError that names the holder where this does not wait.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        holder = self.path / ".lock-holder"
        lock = filelock.FileLock(self.path / LOCK_FILE)
        try:
            lock.acquire(timeout=-1 if wait else LOOK_SECONDS)
        except filelock.Timeout as error:
            name = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
            raise ClaqError(f"{self.path} is in use by {name}; wait for it or stop it") from error
        try:
            write_bytes(holder, this_process().encode())
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()  # the file stays: whoever waits for it must not hold a deleted one

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Write down how the run stands, and how it ends: `run_state` tells."""
        self._note({"state": RUNNING, "process": this_process()})
        try:
            yield
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                self._note({"state": INTERRUPTED})
            raise
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk: the error itself matters more
                self._note({"state": FAILED, "reason": _reason(error)})
            raise
        with contextlib.suppress(OSError):  # results.json says it too
            self._note({"state": FINISHED})

    def _note(self, state: dict[str, str]) -> None:
        write_json(self.path / STATE_FILE, state)


def _reason(error: BaseException) -> str:
    """Return why a run ended; rich makes an exit of a pipe that is closed, as `| head` does."""
    if isinstance(error.__context__, BrokenPipeError):
        return "the program that read its output has ended"
    return telling_line(error)


def this_process() -> str:
    """Return what a person needs to find this process."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_held(path: Path) -> bool:
    """Tell whether a living process holds the lock of that name."""
    if not path.is_file():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False
