"""What became of the jobs of a sweep: one small file a job, beside the runs.

`outputs/NAME/jobs/KEY.json`, with KEY made of the job's overrides, is replaced whenever the job's
state changes.  Jobs write no common file, for they may run on several machines; `jobs/KEY.lock` is
held while one runs, so that a killed one is told from a running one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from claq_exp.checkpoint.files import read_json, write_json
from claq_exp.errors import CheckpointError, ClaqError, first_line
from claq_exp.run_folder import FAILED, INTERRUPTED, KILLED, RUNNING, RunState, is_held

JOBS = "jobs"


@dataclass(frozen=True)
class Job:
    """A job of a sweep.

    number: its place in the sweep that ran it last.  overrides: what a person would type for it.
    folder: name of its run folder beside `jobs`, or None where it failed before it had one.
    found: the run was finished before.  objective: what a sweeper looks at.  seconds: of this try.
    """

    number: int
    overrides: tuple[str, ...]
    state: RunState
    folder: str | None = None
    found: bool = False
    objective: float | None = None
    seconds: float | None = None

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
    content: dict[str, Any] = {
        "number": job.number,
        "overrides": list(job.overrides),
        "state": job.state.name,
        "reason": job.state.reason,
        "folder": job.folder,
        "found": job.found,
        "objective": job.objective,
        "seconds": job.seconds,
    }
    write_json(path, content)


@contextlib.contextmanager
def recorded_job(folder: Path, job: Job) -> Iterator[None]:
    """Hold a job, note that it runs, and how it failed if it does; the caller notes its success.

    Raises ClaqError when another process runs the same job.
    """
    (folder / JOBS).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / JOBS / f"{job.key}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ClaqError(f"another process runs the job {' '.join(job.overrides)}") from error
    try:
        process = f"process {os.getpid()} on {socket.gethostname()}"
        write_job(folder, replace(job, state=RunState(RUNNING, process)))
        try:
            yield
        except KeyboardInterrupt:
            write_job(folder, replace(job, state=RunState(INTERRUPTED)))
            raise
        except BaseException as error:
            with contextlib.suppress(OSError):
                write_job(folder, replace(job, state=RunState(FAILED, first_line(error))))
            raise
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _read(path: Path) -> Job | None:
    try:
        content = read_json(path)
        state = RunState(content["state"], content["reason"])
        job = Job(
            content["number"],
            tuple(content["overrides"]),
            state,
            content["folder"],
            content["found"],
            content["objective"],
            content["seconds"],
        )
    except (CheckpointError, KeyError):
        return None
    if state.name == RUNNING and not is_held(path.with_suffix(".lock")):
        return replace(job, state=RunState(KILLED, state.reason))
    return job
