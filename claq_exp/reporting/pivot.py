"""A table by settings: some of them down, others across, with the runs of a cell merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from claq_exp.reporting.best import mark_best
from claq_exp.reporting.cells import Marks, measured_cell, original_cell
from claq_exp.reporting.collect import Collection, Run
from claq_exp.reporting.columns import Column, check_same_content, choose_columns
from claq_exp.reporting.overrides import config_of
from claq_exp.reporting.report_table import Cell, ReportTable, Row
from claq_exp.reporting.runs_table import (
    SORT,
    finished_runs,
    key_cell,
    mixed_notes,
    model_of,
    order_by,
    rank,
    table_notes,
)
from claq_exp.reporting.settings import check_seeds_only, full_key, setting
from claq_exp.run_folder import RunState

MODEL = "model.name"
Values = tuple[Any, ...]


@dataclass(frozen=True)
class _Frame:
    """Runs by the settings that are rows and columns."""

    row_keys: list[str]
    column_keys: list[str]
    cells: dict[tuple[Values, Values], list[Run]]
    columns: list[Column]
    absent: dict[tuple[Values, Values], RunState]

    @property
    def across(self) -> list[Values]:
        found = dict.fromkeys(across for _, across in self.cells)
        return sorted(found, key=lambda values: [rank(value) for value in values])

    @property
    def down(self) -> list[Values]:
        return list(dict.fromkeys(down for down, _ in self.cells))


def pivot_table(
    collection: Collection,
    title: str,
    *,
    rows: Sequence[str],
    columns: Sequence[str] = (),
    metrics: Sequence[str] = (),
    sort: str = SORT,
) -> ReportTable:
    """Return a table with a row for each value of `rows` and a group for each of `columns`.

    rows, columns: dotted config keys.  Each group shows linear and nominal bits and the metrics.
    Runs that share a cell and differ in seeds only become a mean.
    Raises ConfigError when they differ in more, when there is no finished run, for unknown keys,
    and for numbers that do not compare.
    """
    runs = finished_runs(collection)
    shown = choose_columns(runs, metrics)
    notes = check_same_content(runs, shown)
    row_keys = [full_key(runs, key) for key in dict.fromkeys(rows)]
    column_keys = [full_key(runs, key) for key in dict.fromkeys(columns)]
    if len({model_of(run) for run in runs}) > 1 and MODEL not in [*row_keys, *column_keys]:
        row_keys.insert(0, MODEL)
    cells = _place(runs, row_keys, column_keys)
    absent = _absent(collection, row_keys, column_keys)
    frame = _Frame(row_keys, column_keys, cells, shown, absent)
    marks = Marks()
    counted = any(len(group) > 1 for group in cells.values())
    order, apart = order_by(runs, sort), MODEL in column_keys
    down = sorted(frame.down, key=lambda values: order(_row_runs(frame, values))[apart:])
    body, models = _originals(frame, runs, marks, counted=counted)
    for values in down:
        own = [key_cell(value) for value in values]
        for across in frame.across:
            own += _cells(frame, values, across, marks, counted=counted)
        body.append(Row(own, run=_only_run(frame, values)))
        models.append("" if apart else model_of(_row_runs(frame, values)[0]))
    labels, groups = _headings(frame, counted=counted)
    width = len(shown) + counted
    placed = [None] * len(row_keys) + ([*shown] + [None] * counted) * len(frame.across)
    behind = [_behind(frame, None, width)] * (len(body) - len(down))
    behind += [_behind(frame, values, width) for values in down]
    body, bold = mark_best(body, placed, models, behind)
    numeric = [_numbers(down, place) for place in range(len(row_keys))]
    numeric += [True] * (width * len(frame.across))
    notes = [
        *marks.footnotes(),
        *notes,
        *mixed_notes(cells.values()),
        *bold,
        *table_notes(runs, shown, body),
    ]
    return ReportTable(title, labels, numeric, body, notes, groups if column_keys else [])


def _place(
    runs: Sequence[Run], row_keys: Sequence[str], column_keys: Sequence[str]
) -> dict[tuple[Values, Values], list[Run]]:
    cells: dict[tuple[Values, Values], list[Run]] = {}
    for run in runs:
        place = tuple(
            tuple(setting(run.config, key) for key in keys) for keys in (row_keys, column_keys)
        )
        cells.setdefault(place, []).append(run)  # type: ignore[arg-type]
    for (down, across), group in cells.items():
        shared = zip([*row_keys, *column_keys], [*down, *across], strict=True)
        place_name = ", ".join(f"{key}={key_cell(value).text}" for key, value in shared)
        check_seeds_only(group, place_name, f"--rows {','.join(row_keys)},")
    return cells


def _absent(
    collection: Collection, row_keys: Sequence[str], column_keys: Sequence[str]
) -> dict[tuple[Values, Values], RunState]:
    """Return what became of the runs of a cell that have no results, as far as one can tell."""
    found: dict[tuple[Values, Values], RunState] = {}
    for run in collection.runs:
        if run.results is not None:
            continue
        config = run.config or config_of(run.overrides)
        down, across = (
            tuple(setting(config, key) for key in keys) for keys in (row_keys, column_keys)
        )
        if run.config or None not in (*down, *across):  # else the overrides do not tell the place
            found[down, across] = run.state
    return found


def _row_runs(frame: _Frame, down: Values) -> list[Run]:
    return [run for (values, _), group in frame.cells.items() if values == down for run in group]


def _behind(frame: _Frame, down: Values | None, width: int) -> list[list[Run]]:
    """Return the runs behind each cell of a row; of the original's row (None) none."""
    found: list[list[Run]] = [[] for _ in frame.row_keys]
    for across in frame.across:
        own = [] if down is None else frame.cells.get((down, across), [])
        found += [own] * width
    return found


def _only_run(frame: _Frame, down: Values) -> str | None:
    runs = _row_runs(frame, down)
    return runs[0].name if len(runs) == 1 else None


def _cells(
    frame: _Frame, down: Values, across: Values, marks: Marks, *, counted: bool
) -> list[Cell]:
    group = frame.cells.get((down, across))
    if group is None:
        state = frame.absent.get((down, across))
        reason = ": ".join(filter(None, (state.name, state.reason))) if state else "no run"
        return [Cell("", mark=marks.of(reason))] * (len(frame.columns) + counted)
    cells = [measured_cell(group, column, marks) for column in frame.columns]
    return [*cells, Cell(str(len(group)), len(group))] if counted else cells


def _originals(
    frame: _Frame, runs: Sequence[Run], marks: Marks, *, counted: bool
) -> tuple[list[Row], list[str]]:
    """Return a row for each model before quantization; one for all where models are columns."""
    models = list(dict.fromkeys(model_of(run) for run in runs))
    apart = MODEL in frame.column_keys
    rows = []
    for model in models[:1] if apart else models:
        keys = [Cell("")] * len(frame.row_keys)
        if MODEL in frame.row_keys:
            keys[frame.row_keys.index(MODEL)] = Cell(model)
        free = next((place for place, key in enumerate(frame.row_keys) if key != MODEL), None)
        if free is not None:
            keys[free] = Cell("original")
        for across in frame.across:
            own = [
                run
                for (_, values), group in frame.cells.items()
                for run in group
                if values == across and (apart or model_of(run) == model)
            ] or [run for run in runs if model_of(run) == model]
            keys += [original_cell(own, column, marks) for column in frame.columns]
            keys += [Cell("")] * counted
        rows.append(Row(keys, original=True))
    return rows, models[: len(rows)]


def _headings(frame: _Frame, *, counted: bool) -> tuple[list[str], list[str]]:
    """Return the label of each column and the group above it."""
    labels = [column.label for column in frame.columns] + ["n"] * counted
    groups = [""] * len(frame.row_keys)
    for across in frame.across:
        parts = [_named(key, value) for key, value in zip(frame.column_keys, across, strict=True)]
        groups += [", ".join(parts)] * len(labels)
    return [*frame.row_keys, *labels * len(frame.across)], groups


def _named(key: str, value: Any) -> str:
    """Return a value as a heading; a strategy's name needs no key beside it."""
    *parents, last = key.split(".")
    if last == "name" and value is not None:
        return f"{parents[-1] if parents else key} {value}"
    return f"{last} {key_cell(value).text}" if value is not None else f"no {last}"


def _numbers(down: Sequence[Values], place: int) -> bool:
    values = [values[place] for values in down if values[place] is not None]
    return bool(values) and all(key_cell(value).value is not None for value in values)
