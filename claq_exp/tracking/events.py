"""The record of a run: one JSON object a line, flushed as it happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from claq_exp.system.files import json_safe

TIMED = ("stage", "block")  # events whose numbers are seconds, by kind of work


class Tracker(Protocol):
    """Something that follows a run."""

    def event(self, name: str, data: dict[str, Any]) -> None:
        """Note that something happened."""

    def finish(self, results: dict[str, Any] | None) -> None:
        """Close; `results` is None when the run failed."""


class EventLog:
    """Appends to events.jsonl and passes every event on to the other trackers."""

    def __init__(self, path: Path, others: list[Tracker]) -> None:
        self._path = path
        if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")  # ends the line that a killed process left unfinished
        self._file = path.open("a", encoding="utf-8")
        self._others = others
        self._results: dict[str, Any] | None = None

    def event(self, event: str, /, **data: Any) -> None:
        """Write one line: time in seconds since 1970, event, data; NaN and infinity become null."""
        clean = json_safe(data)
        line = {"time": round(time.time(), 3), "event": event, **clean}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk's does not say where
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        for tracker in self._others:
            tracker.event(event, clean)

    def spent(self) -> dict[str, float]:
        """Return seconds by kind of work and the largest `peak_memory_bytes`.

        Earlier tries at the run are included.
        """
        totals: dict[str, float] = {}
        for event, entry in read_events(self._path):
            if event not in TIMED:
                continue
            for key, value in entry.items():
                if not isinstance(value, int | float):
                    continue  # a stage's name, or a damaged line
                if key == "peak_memory_bytes":
                    totals[key] = max(totals.get(key, 0), value)
                elif key != "block":
                    totals[key] = totals.get(key, 0.0) + value
        return totals

    def results(self, results: dict[str, Any]) -> None:
        """Hand over the final results, for the other trackers' summaries."""
        self._results = results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            self.event("failed", error=str(error) or repr(error))
        self._file.close()
        for tracker in self._others:
            tracker.finish(self._results if error is None else None)


def read_events(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and data of each event; lines that a killed process cut short are skipped."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "event" in entry:
            yield entry["event"], {k: v for k, v in entry.items() if k not in ("time", "event")}
