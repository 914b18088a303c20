"""The table of a report in Weights & Biases, which may be absent or fail without harm."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from claq_exp.errors import telling_line
from claq_exp.reporting.collect import lookup
from claq_exp.reporting.render import plain_rows
from claq_exp.reporting.report import Report
from claq_exp.tracking.wandb import check_wandb, limits

JOB_TYPE = "report"


def log_report(report: Report, folder: Path, *, project: str | None, mode: str) -> str:
    """Log a report's table as one W&B run below a folder; return a line that says how it went.

    project: that of most runs where it is None.  Raises ConfigError when wandb is not installed.
    """
    check_wandb()
    projects = Counter(str(lookup(run.config, "tracking.project")) for run in report.runs)
    chosen = project or projects.most_common(1)[0][0]
    try:
        _log(report, folder, chosen, mode)
    except Exception as error:  # noqa: BLE001 - the report is written already
        return f"Note: Weights & Biases failed and was left out: {telling_line(error)}"
    return f"Logged to Weights & Biases ({mode}), project {chosen}: {folder / 'wandb'}"


def _log(report: Report, folder: Path, project: str, mode: Any) -> None:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    header, rows = plain_rows(report.table)
    columns: list[Any] = [*header]
    data: list[Any] = [*rows]
    run = wandb.init(
        project=project,
        name=report.table.title,
        mode=mode,
        dir=folder,
        job_type=JOB_TYPE,
        config={"runs": [run.name for run in report.runs], "footnotes": report.table.footnotes},
        settings=limits(),
    )
    try:
        run.log({"report": wandb.Table(columns=columns, data=data)})
    finally:
        run.finish()
