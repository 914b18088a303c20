"""A sweep as a person sees it: how far it is while it runs, and a table at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from claq_exp.run_folder import FAILED, FINISHED, INTERRUPTED, KILLED, RUNNING
from claq_exp.run_folder.jobs import Job
from claq_exp.sweep.work import WORST

LOOK_SECONDS = 0.5
QUIET_SECONDS = 60.0  # between two lines where there is no terminal
BROKEN = (FAILED, KILLED, INTERRUPTED)


@dataclass(frozen=True)
class Standing:
    """How a sweep stands.

    total: how many jobs there will be.  jobs: those on record.  fixed: keys that have one value in
    all jobs.
    """

    total: int
    jobs: tuple[Job, ...]
    fixed: frozenset[str] = frozenset()

    def count(self, *states: str) -> int:
        """Return how many jobs are in one of these states."""
        return sum(job.state.name in states for job in self.jobs)

    @property
    def found(self) -> int:
        """How many runs were finished before."""
        return sum(job.found for job in self.jobs)

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return max(0, self.total - len(self.jobs))

    @property
    def share(self) -> float:
        """How much of the sweep is done."""
        done = sum(job.share if job.state.name == RUNNING else 1.0 for job in self.jobs)
        return done / max(self.total, len(self.jobs), 1)

    @property
    def best(self) -> Job | None:
        """The finished job with the lowest objective."""
        finished = [job for job in self.jobs if _value(job) is not None]
        return min(finished, key=lambda job: job.objective or 0.0, default=None)

    @property
    def left(self) -> float | None:
        """Seconds that are left, from what jobs have taken; None where nothing tells yet."""
        took = [
            job.seconds
            for job in self.jobs
            if job.state.name == FINISHED and not job.found and job.seconds
        ]
        running = [job for job in self.jobs if job.state.name == RUNNING]
        took += [
            job.seconds / job.share
            for job in running
            if job.seconds and job.share > 0.05 and not took
        ]
        if not took:
            return None
        mean = sum(took) / len(took)
        work = self.waiting * mean + sum((1 - job.share) * mean for job in running)
        return work / max(1, len(running))

    def line(self) -> str:
        """Say it in one line."""
        running = self.count(RUNNING)
        parts = [f"{self.count(FINISHED)} of {self.total} done"]
        parts += [f"{self.found} of them found"] if self.found else []
        parts += [f"{self.count(state)} {state}" for state in BROKEN if self.count(state)]
        parts += [f"{running} running", f"{self.waiting} waiting"]
        if self.left is not None and running:
            parts.append(f"{clock(self.left)} left")
        if self.best is not None:
            parts.append(f"best {self.best.objective:.4g} ({self.names()[self.best.key]})")
        return ", ".join(parts)

    def names(self) -> dict[str, str]:
        """Return key of a job -> what tells it from the others."""
        return {job.key: self._name(job.overrides) for job in self.jobs}

    def _name(self, overrides: tuple[str, ...]) -> str:
        own = [word for word in overrides if word.partition("=")[0] not in self.fixed]
        return " ".join(own) or "as it is"


def _value(job: Job) -> float | None:
    known = job.state.name == FINISHED and job.objective is not None and job.objective < WORST
    return job.objective if known else None


class SweepView:
    """Follows the records of a sweep's jobs while a launcher is at work.

    read: returns how the sweep stands.  Each job that ends is a line; a terminal shows the running
    ones below, anything else gets a line now and then.
    """

    def __init__(self, read: Callable[[], Standing], console: Console | None = None) -> None:
        self._read = read
        self._console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._all = self._bars.add_task("all jobs", total=1.0, text="")
        self._tasks: dict[str, object] = {}
        self._told: set[str] = set()
        self._spoke = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._bars.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.look(last=True)
        self._bars.stop()

    def _follow(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.look()

    def look(self, *, last: bool = False) -> None:
        """Read the records once and show what is new."""
        standing = self._read()
        names = standing.names()
        for job in standing.jobs:
            if job.state.name != RUNNING and job.key not in self._told:
                self._told.add(job.key)
                self._tell(job, names[job.key])
        self._bars.update(self._all, completed=standing.share, text=standing.line())
        self._show_running(standing.jobs, names)
        now = time.monotonic()
        if not self._console.is_terminal and not last and now - self._spoke > QUIET_SECONDS:
            self._print(f"[{100 * standing.share:3.0f} %] {standing.line()}")
            self._spoke = now

    def _tell(self, job: Job, name: str) -> None:
        if job.state.name != FINISHED:
            reason = f": {job.state.reason}" if job.state.reason else ""
            self._print(f"claq-exp: job {job.number} {job.state.name} ({name}){reason}")
            return
        value = _value(job)
        parts = ["found finished" if job.found else f"finished in {clock(job.seconds or 0)}"]
        parts += [f"{value:.4g}"] if value is not None else []
        self._print(f"job {job.number} {', '.join(parts)} ({name})")
        for note in job.notes:
            self._print(f"  Note: {note}")

    def _show_running(self, jobs: Sequence[Job], names: dict[str, str]) -> None:
        running = {job.key: job for job in jobs if job.state.name == RUNNING}
        for key in [key for key in self._tasks if key not in running]:
            self._bars.remove_task(self._tasks.pop(key))  # type: ignore[arg-type]
        for key, job in running.items():
            if key not in self._tasks:
                self._tasks[key] = self._bars.add_task(f"job {job.number}", total=1.0, text="")
            text = f"{job.stage}  {names[key]}"
            self._bars.update(self._tasks[key], completed=job.share, text=text)  # type: ignore[arg-type]

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def jobs_table(standing: Standing, measure: str) -> Table:
    """Return a row for each job.  measure: what the objective is; empty where there is none."""
    table = Table()
    for column in ("#", "job", "state", *([measure] if measure else []), "time"):
        right = column in ("#", measure, "time")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    names, best = standing.names(), standing.best
    for job in standing.jobs:
        value = _value(job)
        shown = "" if value is None else f"{value:.4g}"
        state = "found finished" if job.found else job.state.name
        reason = f": {job.state.reason}" if job.state.reason and job.state.name in BROKEN else ""
        style = "bold" if best is not None and job.key == best.key else ""
        time_ = "" if job.found else clock(job.seconds or 0)
        measured = [shown] if measure else []
        cells = (str(job.number), names[job.key], f"{state}{reason}", *measured, time_)
        table.add_row(*map(Text, cells), style=style)  # no cell is markup
    return table


def clock(seconds: float) -> str:
    """Return a time for people: 45 s, 3:05 min, 2:03 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
