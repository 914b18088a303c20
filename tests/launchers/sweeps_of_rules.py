"""Sweeps on the tiny model in which a job does something odd."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from claq_exp.run_folder.jobs import Job, read_jobs

DEADLY = [
    "experiment=kmeans_3bit",
    "precision.name=deadly_rules:Rule",
    "~precision.bits",
    "~evaluation.corpora.wikipedia",
    "threads=1",
]


def words_for(tiny_run: list[str], place: Path, *more: str) -> list[str]:
    """Return overrides of a run with the deadly rule, which leaves its marks in `place`."""
    return [*tiny_run, *DEADLY, f"+precision.place={place}", *more]


def by_how(folder: Path) -> dict[str, Job]:
    """Return what the rule did -> the job on record."""
    return {
        word.partition("=")[2]: job
        for job in read_jobs(folder)
        for word in job.overrides
        if word.startswith("+precision.how=")
    }


def signal_when(mark: Path, number: signal.Signals) -> threading.Thread:
    """Send this process a signal as soon as the rule has left a mark."""

    def wait() -> None:
        while not mark.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
