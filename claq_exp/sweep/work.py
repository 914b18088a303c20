"""The work of one job: its run, and what a sweep needs to know of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from claq_exp.config import ExperimentConfig
from claq_exp.reporting.tables import overlap_notes, text_notes
from claq_exp.run.runner import run
from claq_exp.run_folder.fallbacks import ENDS
from claq_exp.tracking.progress import RunProgress

WORST = 1e9  # the objective of a job that failed: a sweeper would stop at NaN or infinity
OnShare = Callable[[float, str], None]


@dataclass(frozen=True)
class Order:
    """What a job is to do.

    command: what a person typed for the sweep.  environment: variables of the job's process.
    log: file for what libraries print.
    """

    config: ExperimentConfig
    command: str
    environment: dict[str, str]
    log: Path


@dataclass(frozen=True)
class Done:
    """What a finished job left: name of its run folder, and as in `Outcome`."""

    folder: str
    found: bool
    objective: float | None
    notes: tuple[str, ...]


def run_here(order: Order, on_share: OnShare) -> Done:
    """Run a job in this process.  on_share: called with the share that is done and the stage."""
    outcome = run(
        order.config, order.command, progress=partial(RunProgress, on_share=on_share), wait=True
    )
    read = text_notes(outcome.results)
    kept = filter(None, [outcome.results.get("fallbacks", {}).get(ENDS)])
    notes = (*read, *overlap_notes(outcome.results), *kept, *outcome.notes)
    return Done(outcome.folder.name, outcome.found, objective(outcome.results), notes)


def objective(results: dict[str, Any]) -> float | None:
    """Return the quantized model's first perplexity, at most `WORST`; None where there is none."""
    for row in results["perplexity"].values():
        value = row["quantized"]  # null stands for an infinite one
        return WORST if value is None or not math.isfinite(value) else min(float(value), WORST)
    return None
