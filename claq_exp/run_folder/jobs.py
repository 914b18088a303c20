"""What became of the jobs of a sweep: one small file a job, beside the runs.

`outputs/NAME/jobs/KEY.json`, with KEY made of the job's overrides, is replaced whenever the job's
state changes.  Jobs write no common file, for they may run on several machines; `jobs/KEY.lock` is
held while one runs, so that a killed one is told from a running one.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from claq_exp.errors import CheckpointError, ClaqError, telling_line
from claq_exp.run_folder import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    KILLED,
    RUNNING,
    RunState,
    is_held,
    this_process,
)
from claq_exp.system.files import read_json, write_json

JOBS = "jobs"
QUIET_SECONDS = 2.0  # between two notes of how far a job is


class JobKilledError(ClaqError):
    """A job whose process is gone without a word of its own."""


class JobInterruptedError(ClaqError):
    """A job that ended because it was asked to; the sweep's own end is another matter."""


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    number: its place in the sweep that ran it last.  overrides: what a person would type for it.
    folder: name of its run folder beside `jobs`, or None where it failed before it had one.
    results: the folder `outputs/NAME`.  found: the run was finished before.  objective: what a
    sweeper looks at.  seconds: of this try.  share: how much of a running job is done, 0 to 1.
    stage: what it is at.  notes: what a reader of its results must know.  seeds: it is one of
    several seeds of a recipe (`seeds=`), which reports make one row of.
    """

    number: int
    overrides: tuple[str, ...]
    state: RunState
    folder: str | None = None
    results: str = ""
    found: bool = False
    objective: float | None = None
    seconds: float | None = None
    share: float = 0.0
    stage: str = ""
    notes: tuple[str, ...] = ()
    seeds: bool = False

    @property
    def key(self) -> str:
        """A short hash of the overrides."""
        return hashlib.sha256("\n".join(sorted(self.overrides)).encode()).hexdigest()[:12]


def read_jobs(folder: Path) -> list[Job]:
    """Return the jobs that are on record in `outputs/NAME`, by number; none for plain runs."""
    jobs = [_read(path) for path in sorted((folder / JOBS).glob("*.json"))]
    return sorted((job for job in jobs if job), key=lambda job: (job.number, job.key))


def write_job(folder: Path, job: Job) -> None:
    """Put a job on record in `outputs/NAME`."""
    path = folder / JOBS / f"{job.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(job))


class JobRecord:
    """The record of one job while it runs, in each of the folders that keep one."""

    def __init__(self, folders: Sequence[Path], job: Job) -> None:
        self._folders, self._job = folders, job
        self._started = self._noted = time.monotonic()

    def progress(self, share: float, stage: str) -> None:
        """Note how far the job is, now and then."""
        now = time.monotonic()
        if stage.partition(" ")[0] != self._job.stage.partition(" ")[0] or (
            now - self._noted > QUIET_SECONDS
        ):
            self.note(RunState(RUNNING, self._job.state.reason), share=share, stage=stage)
            self._noted = now

    def finish(
        self, *, folder: str, found: bool, objective: float | None, notes: tuple[str, ...]
    ) -> None:
        """Note that the job's run is finished."""
        self.note(
            RunState(FINISHED),
            folder=folder,
            found=found,
            objective=objective,
            notes=notes,
            share=1.0,
            stage="",
        )

    def note(self, state: RunState, **changes: Any) -> None:
        """Replace the record."""
        seconds = round(time.monotonic() - self._started, 3)
        self._job = replace(self._job, state=state, seconds=seconds, **changes)
        for folder in self._folders:
            write_job(folder, self._job)


@contextlib.contextmanager
def recorded_job(
    folders: Sequence[Path], job: Job, check: Callable[[], None] = lambda: None
) -> Iterator[JobRecord]:
    """Hold a job, note that it runs, and how it failed if it does; the caller notes its success.

    folders: `outputs/NAME`, and others that keep the same record.  Where another process runs the
    same job, this waits for its end, and calls `check` now and then, which may raise.
    """
    with contextlib.ExitStack() as held:
        for folder in folders:
            held.enter_context(_held(folder / JOBS / f"{job.key}.lock", check))
        record = JobRecord(folders, job)
        record.note(RunState(RUNNING, this_process()))
        try:
            yield record
        except (JobInterruptedError, KeyboardInterrupt, SystemExit):
            record.note(RunState(INTERRUPTED))
            raise
        except JobKilledError as error:
            record.note(RunState(KILLED, str(error)))
            raise
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk: the error itself matters more
                record.note(RunState(FAILED, telling_line(error)))
            raise


@contextlib.contextmanager
def _held(path: Path, check: Callable[[], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    while not lock.is_locked:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=1.0)
        if not lock.is_locked:
            check()
    try:
        yield
    finally:
        lock.release()  # the file stays: whoever waits for it must not hold a deleted one


def _read(path: Path) -> Job | None:
    try:
        content = read_json(path)
        state = RunState(**content.pop("state"))
        overrides, notes = (tuple(content.pop(key)) for key in ("overrides", "notes"))
        job = Job(overrides=overrides, state=state, notes=notes, **content)
    except (CheckpointError, KeyError, TypeError):
        return None
    if state.name == RUNNING and not is_held(path.with_suffix(".lock")):
        return replace(job, state=RunState(KILLED, state.reason))
    return job
