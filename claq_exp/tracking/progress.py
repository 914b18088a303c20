"""One progress bar for a whole run, in estimated seconds of work."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 30.0  # between two lines where there is no terminal


class RunProgress:
    """The stage and the time left; without a terminal, a line per stage and some between.

    estimates: stage -> expected seconds.  A stage that takes longer or shorter changes the speed at
    which the bar moves, and with it the time left.
    on_share: called with the share that is done (0 to 1) and the stage, in place of any output.
    verbose: a person asked for a line per tensor.
    """

    def __init__(
        self,
        estimates: dict[str, float],
        console: Console | None = None,
        on_share: Callable[[float, str], None] | None = None,
        *,
        verbose: bool = False,
    ) -> None:
        self.verbose = verbose
        self._estimates = {stage: max(seconds, 0.1) for stage, seconds in estimates.items()}
        self._console = console or Console(file=own_stderr())
        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=120,
            disable=on_share is not None or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=sum(self._estimates.values()))
        self._on_share = on_share
        self._stage = ""
        self._done = 0.0
        self._spoke = 0.0

    def stage(self, name: str) -> None:
        """Begin a stage, or go on with it; the one before counts as finished."""
        if name == self._stage:
            return
        self._finish_stage()
        self._stage = name
        self._show(name, always=True)

    def advance(self, share: float, detail: str = "") -> None:
        """Finish a share (0 to 1) of the current stage."""
        step = share * self._estimates.get(self._stage, 0.0)
        step = min(step, self._estimates.get(self._stage, 0.0) - self._done)
        self._done += step
        self._bar.advance(self._task, step)
        self._show(f"{self._stage} {detail}".strip())

    def line(self, text: str) -> None:
        """Show a line that stays, above the bar where there is one."""
        if self._on_share is None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_stage()
        self._bar.stop()

    def _finish_stage(self) -> None:
        self._bar.advance(self._task, self._estimates.pop(self._stage, 0.0) - self._done)
        self._stage, self._done = "", 0.0

    def _show(self, text: str, *, always: bool = False) -> None:
        self._bar.update(self._task, description=text)
        if self._on_share is not None:
            self._on_share(self._bar.tasks[0].percentage / 100, text)
            return
        now = time.monotonic()
        if not self._console.is_terminal and (always or now - self._spoke > QUIET_SECONDS):
            percent = self._bar.tasks[0].percentage
            self._console.print(f"[{percent:3.0f} %] {text}", markup=False, highlight=False)
            self._spoke = now


@contextlib.contextmanager
def noise_to(path: Path) -> Iterator[None]:
    """Send what others write to standard output and error, child processes included, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with path.open("ab") as log:
        for descriptor in kept:
            os.dup2(log.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in kept.items():
            os.dup2(original, descriptor)
            os.close(original)


def own_stderr():  # type: ignore[no-untyped-def]
    """Return a stream to standard error that stays with the terminal inside `noise_to`."""
    return os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
