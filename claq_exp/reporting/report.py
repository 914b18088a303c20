"""Turns folders of runs into the files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from claq_exp.checkpoint.files import write_bytes
from claq_exp.reporting.collect import Collection, Run, collect, measures
from claq_exp.reporting.grid import Grid
from claq_exp.reporting.labels import method_label
from claq_exp.reporting.pivot import pivot_grid
from claq_exp.reporting.plots import plot_tradeoff
from claq_exp.reporting.render import to_csv, to_latex, to_markdown
from claq_exp.reporting.runs_table import SORT, model_of, runs_grid, unfinished_grid
from claq_exp.reporting.terminal import slim


@dataclass(frozen=True)
class TableOptions:
    """Which table: one of all runs, or, with rows or columns, a pivot; see the two modules."""

    by: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    sort: str = SORT
    seeds: bool = False


@dataclass(frozen=True)
class Report:
    """The runs, the main table, that of unfinished runs, notes on what was left out, the files."""

    runs: list[Run]
    grid: Grid
    unfinished: Grid | None
    notes: list[str]
    files: list[Path]


def make_report(folders: Sequence[Path], into: Path, options: TableOptions) -> Report:
    """Write report.md, report.csv, report.tex and plots of all runs below folders.

    Raises ConfigError when there is no finished run, for unknown keys, and for runs whose numbers
    do not compare: other tokens or questions under one name.
    """
    collection = collect(folders)
    grid = make_grid(collection, " and ".join(_name(folder) for folder in folders), options)
    unfinished = unfinished_grid(collection)
    into.mkdir(parents=True, exist_ok=True)
    parts = [to_markdown(grid)]
    if unfinished:
        parts.append(f"{unfinished.title}:\n\n{to_markdown(unfinished)}")
    parts += [f"{note}\n" for note in collection.notes]
    contents = {
        "report.md": "\n".join(parts),
        "report.csv": to_csv(grid),
        "report.tex": to_latex(slim(grid, without=("run",))),
    }
    for name, text in contents.items():
        write_bytes(into / name, text.encode())
    files = [into / name for name in contents]
    files += _plots(collection.finished, into)
    return Report(collection.finished, grid, unfinished, collection.notes, files)


def make_grid(collection: Collection, title: str, options: TableOptions) -> Grid:
    """Return the table that was asked for."""
    if options.rows or options.columns:
        return pivot_grid(
            collection,
            title,
            rows=options.rows,
            columns=options.columns,
            metrics=options.metrics,
            sort=options.sort,
        )
    return runs_grid(
        collection,
        title,
        by=options.by,
        metrics=options.metrics,
        sort=options.sort,
        seeds=options.seeds,
    )


def _name(folder: Path) -> str:
    return folder.resolve().name or str(folder)


def _plots(runs: list[Run], folder: Path) -> list[Path]:
    """Draw each perplexity over linear bits, where there is one model."""
    if len({model_of(run) for run in runs}) > 1:
        return []
    files = []
    keys = dict.fromkeys(key for run in runs for key in measures(run) if key[:11] == "perplexity.")
    for key in keys:
        found = [(run, measures(run)[key]) for run in runs if key in measures(run)]
        rows = [
            {
                "method": method_label(run.config),
                "linear bits": measures(run)["bits.linear"].quantized,
                found[0][1].label: measure.quantized,
            }
            for run, measure in found
            if measure.quantized is not None
        ]
        if rows:
            files.append(folder / f"{found[0][1].name}_perplexity.png")
            original = next((m.original for _, m in found if m.original is not None), None)
            plot_tradeoff(pd.DataFrame(rows), found[0][1].label, original, files[-1])
    return files
