"""The table at the end of a sweep over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from claq_exp.reporting.collect import Collection, read_run
from claq_exp.reporting.runs_table import runs_table
from claq_exp.reporting.terminal import slim, to_terminal
from claq_exp.run_folder import FINISHED
from claq_exp.run_folder.jobs import Job


def means_of_jobs(jobs: Sequence[Job], width: int) -> list[Table]:
    """Return the table of what finished jobs of a sweep measured, a row for each recipe.

    width: of the terminal.  Raises ConfigError and CheckpointError as a report of them would.
    """
    folders = {
        Path(job.results) / job.folder: None
        for job in jobs
        if job.state.name == FINISHED and job.folder is not None
    }
    runs = [replace(read_run(folder), together=True) for folder in folders]
    table = runs_table(Collection(runs, []), "Means over seeds")
    return to_terminal(slim(table, without=("run",)), width, "report.md")
