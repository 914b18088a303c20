"""Two runs beside each other: what differs in their settings and in every number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from claq_exp.errors import ConfigError
from claq_exp.reporting.cells import NOT_FINITE, NOT_MEASURED, Marks, number
from claq_exp.reporting.collect import Measure, Run, is_run_folder, read_run
from claq_exp.reporting.columns import same_content
from claq_exp.reporting.external import is_external
from claq_exp.reporting.render import to_markdown
from claq_exp.reporting.report_table import Cell, ReportTable, Row
from claq_exp.reporting.settings import flatten, is_seed
from claq_exp.reporting.verdicts import runs_of, seed_verdicts, window_verdicts

MOST = 10  # layers that are shown
COLUMNS = ["", "A", "B", "difference", "ratio"]
NUMERIC = [False, True, True, True, True]
ABOUT = ("versions", "device", "git")
PER_LAYER = {
    "output_error": "relative output error on the calibration text",
    "bits": "stored bits per weight",
}


def compare_runs(first: Path, second: Path) -> list[ReportTable]:
    """Return tables of settings, circumstances, measures and layers in which two runs differ.

    And of whether perplexity and KL differ by more than chance.

    The first run is A, the second B; differences are B - A, ratios B / A.
    Raises ConfigError for a folder that holds no finished run.
    """
    one, two = finished_run(first), finished_run(second)
    columns = ["", "A", "B"]
    about = _differences(_about(one), _about(two))
    tables = [
        _settings(one, two),
        ReportTable("Made by what differs", columns, [False] * 3, about),
        window_verdicts(one, two),
        _measures(one, two),
        _ledger(one, two),
        *_layers(one, two),
    ]
    return [table for table in tables if table.rows]


def compare_folders(first: Path, second: Path, *, seeds: bool = False) -> list[ReportTable]:
    """Return the tables of two runs, or of two groups of runs that differ in their seeds only.

    seeds: the folders are of runs, and stand for those beside them of other seeds too.
    Raises ConfigError as `compare_runs`, and for groups that do not compare.
    """
    if is_run_folder(first) and is_run_folder(second) and not seeds:
        return compare_runs(first, second)
    one, two = (runs_of(folder, seeds=seeds) for folder in (first, second))
    tables = [_settings(one[0], two[0], seeds=False), seed_verdicts(one, two)]
    return [table for table in tables if table.rows]


def comparison_markdown(first: Path, second: Path, tables: list[ReportTable]) -> str:
    """Return the tables as one Markdown text."""
    parts = [f"# A and B\n\n* A: `{first}`\n* B: `{second}`\n"]
    parts += [f"## {table.title}\n\n{to_markdown(table)}" for table in tables]
    return "\n".join(parts)


def finished_run(folder: Path) -> Run:
    """Return the run of a folder.  Raises ConfigError where it is none, or not finished."""
    run = read_run(folder)
    if run.results is None:
        state = ": ".join(filter(None, (run.state.name, run.state.reason)))
        raise ConfigError(f"report: the run in {folder} has no results, it is {state}")
    return run


def _settings(one: Run, two: Run, *, seeds: bool = True) -> ReportTable:
    """Return the settings that differ; beside a checkpoint of others, those that both have."""
    before, after = flatten(one.config), flatten(two.config)
    outside = [name for name, run in (("A", one), ("B", two)) if is_external(run.results or {})]
    notes = [f"{name} is external: how it was made is not known." for name in outside]
    if outside:
        shared = before.keys() & after.keys()
        before, after = ({k: v for k, v in each.items() if k in shared} for each in (before, after))
    rows = _differences(before, after)
    if not seeds:
        rows = [row for row in rows if not is_seed(row.cells[0].text)]
    return ReportTable("Settings that differ", ["", "A", "B"], [False] * 3, rows, notes)


def _differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[Row]:
    rows = []
    for key in dict.fromkeys([*one, *two]):
        before, after = (_text(values, key) for values in (one, two))
        if before != after:
            rows.append(Row([Cell(key), Cell(before), Cell(after)]))
    return rows


def _text(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return ""
    value = values[key]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _about(run: Run) -> dict[str, Any]:
    about = (run.results or {}).get("run", {})
    return flatten({key: about[key] for key in ABOUT if key in about})


def _measures(one: Run, two: Run) -> ReportTable:
    marks, rows = Marks(), []
    before, after = one.measures, two.measures
    for key in dict.fromkeys([*before, *after]):
        pair = before.get(key), after.get(key)
        known = pair[0] or pair[1]
        if known is None:
            continue
        alike = None in pair or same_content(*[item.content for item in pair if item])
        values = [item.quantized if item else None for item in pair]
        cells = [_value_cell(item, marks) for item in pair]
        if alike:
            cells += _change(values[0], values[1], known.digits)
        else:
            cells += [Cell("", mark=marks.of("measured on different content"))] * 2
        rows.append(Row([Cell(known.label), *cells]))
    return ReportTable("Measures", COLUMNS, NUMERIC, rows, marks.footnotes())


def _value_cell(measure: Measure | None, marks: Marks) -> Cell:
    if measure is None or (measure.quantized is None and measure.kind in ("time", "memory")):
        return Cell("", mark=marks.of(NOT_MEASURED))
    if measure.quantized is None:
        return Cell("", mark=marks.of(NOT_FINITE))
    return Cell(number(measure.quantized, measure.digits), measure.quantized)


def _change(before: float | None, after: float | None, digits: int) -> list[Cell]:
    """Return difference and ratio; blank where a value is missing, or a division by zero."""
    if before is None or after is None:
        return [Cell(""), Cell("")]
    difference = after - before
    sign = "+" if difference > 0 else ""
    ratio = after / before if before else math.inf
    cells = [Cell(sign + number(difference, digits), difference)]
    return [*cells, Cell(number(ratio, 3), ratio) if math.isfinite(ratio) else Cell("")]


def _layers(one: Run, two: Run) -> list[ReportTable]:
    """Return, for error and bits, the layers in which runs differ most."""
    before, after = ({row["name"]: row for row in run.layers} for run in (one, two))
    shared = [name for name in before if name in after]
    notes = []
    if alone := len(before) + len(after) - 2 * len(shared):
        notes.append(f"Layers in one of the runs only: {alone}.")
    tables = []
    for field, label in PER_LAYER.items():
        pairs: dict[str, tuple[Any, Any]] = {
            name: (before[name].get(field), after[name].get(field)) for name in shared
        }
        rows = [_numbers(name, *pair, digits=4) for name, pair in pairs.items() if _differ(*pair)]
        rows.sort(key=lambda row: -abs(row.cells[3].value or 0.0))
        title = f"Layers that differ most in {label}"
        more = [f"{len(rows) - MOST} more layers differ."] if len(rows) > MOST else []
        tables.append(ReportTable(title, COLUMNS, NUMERIC, rows[:MOST], [*more, *notes]))
    return tables


def _differ(*pair: Any) -> bool:
    """Tell two numbers that differ; a missing one or one that is not finite does not compare."""
    known = all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair)
    return known and pair[0] != pair[1]


def _numbers(name: str, before: float, after: float, digits: int) -> Row:
    values = [Cell(number(value, digits), value) for value in (before, after)]
    return Row([Cell(name), *values, *_change(before, after, digits)])


def _ledger(one: Run, two: Run) -> ReportTable:
    """Return the megabytes by purpose."""
    before, after = ((run.results or {})["bits"].get("ledger", {}) for run in (one, two))
    rows = [
        _numbers(account, before[account] / 8e6, after[account] / 8e6, digits=3)
        for account in before
        if account in after and _differ(before[account], after[account])
    ]
    return ReportTable("Stored megabytes by purpose", COLUMNS, NUMERIC, rows)
