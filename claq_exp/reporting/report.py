"""Turns folders of runs into the files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claq_exp.reporting.collect import Collection, Run, collect
from claq_exp.reporting.page import write_page
from claq_exp.reporting.pictures import Picture, draw_report
from claq_exp.reporting.pivot import pivot_table
from claq_exp.reporting.render import escaped, to_csv, to_latex, to_markdown
from claq_exp.reporting.report_table import ReportTable
from claq_exp.reporting.runs_table import SORT, runs_table, unfinished_table
from claq_exp.reporting.terminal import slim
from claq_exp.system.files import write_bytes

PAGE = "report.html"
PICTURES = "pictures"


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
    """What a report shows and has written.

    runs: the finished ones.  table: of them.  unfinished: that of the others.  notes: on what was
    left out.  files: report.*, the Markdown first.
    """

    runs: list[Run]
    table: ReportTable
    unfinished: ReportTable | None
    notes: list[str]
    files: list[Path]
    pictures: list[Picture]


def make_report(folders: Sequence[Path], into: Path, options: TableOptions) -> Report:
    """Write report.md, report.csv, report.tex, report.html and pictures of all runs below folders.

    Raises ConfigError when there is no finished run, for unknown keys, and for runs whose numbers
    do not compare: other tokens or questions under one name.
    """
    collection = collect(folders)
    table = make_table(collection, " and ".join(_name(folder) for folder in folders), options)
    unfinished = unfinished_table(collection)
    (into / PICTURES).mkdir(parents=True, exist_ok=True)
    pictures = draw_report(collection.runs, into / PICTURES)
    contents = {
        "report.md": _markdown(table, unfinished, collection.notes, pictures),
        "report.csv": to_csv(table),
        "report.tex": to_latex(slim(table, without=("run",))),
    }
    for name, text in contents.items():
        write_bytes(into / name, text.encode())
    write_page(into / PAGE, table.title, collection, [slim(table)], pictures)
    files = [into / name for name in (*contents, PAGE)]
    return Report(collection.finished, table, unfinished, collection.notes, files, pictures)


def _markdown(
    table: ReportTable,
    unfinished: ReportTable | None,
    notes: Sequence[str],
    pictures: Sequence[Picture],
) -> str:
    parts = [to_markdown(table)]
    if unfinished:
        parts.append(f"{unfinished.title}:\n\n{to_markdown(unfinished)}")
    parts += [f"{escaped(note)}\n" for note in notes]
    parts += [f"![{escaped(item.title)}]({PICTURES}/{item.png.name})\n" for item in pictures]
    return "\n".join(parts)


def make_table(collection: Collection, title: str, options: TableOptions) -> ReportTable:
    """Return the table that was asked for."""
    if options.rows or options.columns:
        return pivot_table(
            collection,
            title,
            rows=options.rows,
            columns=options.columns,
            metrics=options.metrics,
            sort=options.sort,
        )
    return runs_table(
        collection,
        title,
        by=options.by,
        metrics=options.metrics,
        sort=options.sort,
        seeds=options.seeds,
    )


def _name(folder: Path) -> str:
    return folder.resolve().name or str(folder)
