"""The table with a row for every run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from claq_exp.errors import ConfigError
from claq_exp.evaluation.caveats import caveats
from claq_exp.reporting.best import mark_best
from claq_exp.reporting.cells import (
    Marks,
    measured_cell,
    original_cell,
    standard_errors,
)
from claq_exp.reporting.collect import Collection, Run
from claq_exp.reporting.columns import Column, check_same_content, choose_columns, known_columns
from claq_exp.reporting.labels import families_of, recipe_labels
from claq_exp.reporting.overrides import agree
from claq_exp.reporting.report_table import Cell, ReportTable, Row
from claq_exp.reporting.seeds import TOGETHER, group_runs
from claq_exp.reporting.settings import (
    differing,
    full_key,
    is_seed,
    setting,
)
from claq_exp.reporting.tables import external_notes, overlap_notes, text_notes
from claq_exp.run_folder import settings_file
from claq_exp.run_folder.fallbacks import ENDS, layer_notes
from claq_exp.system.files import read_json

SORT = "bits.linear"
COUNTED = "Linear bits count all that is stored for the quantized layers, nominal bits the codes."
NAMED = 4  # keys that a footnote names


def runs_table(
    collection: Collection,
    title: str,
    *,
    by: Sequence[str] = (),
    metrics: Sequence[str] = (),
    sort: str = SORT,
    seeds: bool = False,
) -> ReportTable:
    """Return a table of all finished runs, below the original of each model.

    by: config keys that become the first columns.  metrics: see `choose_columns`.  sort: a measure,
    best first, or a config key.  seeds: make one row of runs that differ in seeds only; those that
    `seeds=` has run are one row in any case, unless `by` names a seed.
    Raises ConfigError when there is no finished run, for unknown keys, and for numbers that do not
    compare.
    """
    runs = finished_runs(collection)
    columns = choose_columns(runs, metrics, sizes=True)
    notes = check_same_content(runs, columns)
    families = families_of(run.config for run in runs)
    own = ("model", *families)
    keys = {key: full_key(runs, key) for key in dict.fromkeys(by) if key not in own}
    apart = any(map(is_seed, keys.values()))
    groups = sorted(group_runs(runs, merge=seeds, apart=apart), key=order_by(runs, sort))
    marks, merged = Marks(), any(len(group) > 1 for group in groups)
    rows, models, behind = [], [], []
    for model in dict.fromkeys(model_of(group[0]) for group in groups):
        same = [group for group in groups if model_of(group[0]) == model]
        before = [run for group in same for run in group]
        rows.append(_original_row(before, columns, keys, families, marks, counted=merged))
        rows += [_row(group, columns, keys, families, marks, counted=merged) for group in same]
        models += [model] * (1 + len(same))
        behind += [before, *same]
    labels = [column.label for column in columns]
    count = ["n"] if merged else []
    placed = [None] * (len(keys) + len(own)) + [*columns] + [None] * (len(count) + 1)
    rows, bold = mark_best(rows, placed, models, [[own] * len(placed) for own in behind])
    numeric = [_all_numbers(rows, place) for place in range(len(keys))]
    numeric += [False] * len(own) + [True] * (len(columns) + len(count)) + [False]
    notes = [
        *marks.footnotes(),
        *notes,
        *_alike(groups, keys),
        *mixed_notes(groups),
        *([TOGETHER] if merged and not seeds else []),
        *bold,
        *table_notes(runs, columns, rows),
    ]
    return ReportTable(title, [*keys, *own, *labels, *count, "run"], numeric, rows, notes)


def unfinished_table(collection: Collection) -> ReportTable | None:
    """Return a table of the runs and jobs without results, and why; None where there are none.

    Jobs without a folder go by the overrides in which they differ, or from finished runs.
    """
    open_ = [run for run in collection.runs if run.results is None]
    if not open_:
        return None
    jobs = [set(run.overrides) for run in open_ if run.folder is None]
    common = set.intersection(*jobs) if len(jobs) > 1 else set()
    configs = [run.config for run in collection.finished]
    shared = {word for word in common if all(agree([word], config) for config in configs)}
    rows = []
    for run in open_:
        own = " ".join(word for word in run.overrides if word not in shared)
        name = own if run.folder is None and own else run.name
        rows.append(Row([Cell(name), Cell(run.state.name), Cell(run.state.reason)], run=run.name))
    return ReportTable("Without results", ["run", "state", "reason"], [False] * 3, rows)


def finished_runs(collection: Collection) -> list[Run]:
    """Return the finished runs.  Raises ConfigError that says what became of the others."""
    if collection.finished:
        return collection.finished
    states = [run.state.name for run in collection.runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    run = collection.runs[0]
    reason = f": {run.state.reason}" if run.state.reason else ""
    raise ConfigError(
        f"report: no finished run ({counts}), the first is {run.name}, {run.state.name}{reason}"
    )


def model_of(run: Run) -> str:
    """Return the name of a run's model."""
    return str(run.config["model"]["name"])


def order_by(runs: Sequence[Run], sort: str) -> Callable[[Sequence[Run]], Any]:
    """Return the sort key of groups of runs: model, then a measure (best first) or a setting.

    Raises ConfigError for a measure or key that no run has.
    """
    column = next((column for column in known_columns(runs) if column.key == sort), None)
    if column is None:
        key = full_key(runs, sort)
        return lambda group: (model_of(group[0]), rank(setting(group[0].config, key)))
    sign = -1 if column.better == "higher" else 1

    def order(group: Sequence[Run]) -> Any:
        values = _values(group, column)
        place = sign * statistics.fmean(values) if values else 0.0
        return model_of(group[0]), not values, place, group[0].name

    return order


def rank(value: Any) -> tuple[int, float, str]:
    """Return a key that sorts settings: none, then numbers, then words."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, (int, float)) else (2, 0.0, str(value))


def key_cell(value: Any) -> Cell:
    """Return a setting as a cell."""
    if value is None:
        return Cell("")
    if isinstance(value, bool):
        return Cell(str(value).lower())
    if isinstance(value, (int, float)):
        return Cell(f"{value:g}" if isinstance(value, float) else str(value), value)
    return Cell(str(value))


def table_notes(runs: Sequence[Run], columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Return what a reader of any table of these runs must know."""
    notes = [COUNTED]
    if any(cell.deviation is not None for row in rows for cell in row.cells):
        notes.append("± is the sample standard deviation over n seeds.")
    notes += standard_errors(runs, columns)
    for model, remark in dict.fromkeys(
        (model_of(run), run.config["model"].get("remark")) for run in runs
    ):
        notes += [f"{model}: {remark}."] if remark else []
    for told in (external_notes, text_notes, overlap_notes, _kept_ends):
        notes += dict.fromkeys(f"{note}." for run in runs for note in told(run.results or {}))
    notes += dict.fromkeys(
        f"{caveat.words}."
        for run in runs
        for caveat in caveats(run.results or {})
        if caveat.kind == "cut"
    )
    fallen = [run for run in runs if layer_notes((run.results or {}).get("fallbacks", {}))]
    if fallen:
        notes.append(
            f"In {len(fallen)} of {len(runs)} runs some layers have a fallback: fallbacks in "
            "results.json, and layers.csv."
        )
    return notes


def _kept_ends(results: dict[str, Any]) -> list[str]:
    """Say why the embedding of a run stays in 16 bits, where it was to be packed."""
    return list(filter(None, [results.get("fallbacks", {}).get(ENDS)]))


def mixed_notes(groups: Iterable[Sequence[Run]]) -> list[str]:
    """Say where runs of one mean had other inputs, code or machines."""
    found: dict[str, None] = {}
    for group in groups:
        about = [_about(run) for run in group] if len(group) > 1 else []
        found |= {what: None for row in about for what in row if row[what] != about[0][what]}
    return [f"Some means are over runs that differ in {', '.join(found)}."] if found else []


def _about(run: Run) -> dict[str, Any]:
    """Return what runs of one mean should share; `inputs` are the hashes of models and texts."""
    about = (run.results or {}).get("run", {})
    path = settings_file(run.folder) if run.folder else None
    inputs = read_json(path).get("contents") if path and path.is_file() else None
    return {"inputs": inputs, **{what: about.get(what) for what in ("versions", "device", "git")}}


def _row(
    group: Sequence[Run],
    columns: Sequence[Column],
    keys: dict[str, str],
    families: Sequence[str],
    marks: Marks,
    *,
    counted: bool,
) -> Row:
    config = group[0].config
    values = {key: [setting(run.config, full) for run in group] for key, full in keys.items()}
    name = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"
    cells = [
        *(key_cell(own[0] if len(set(own)) == 1 else None) for own in values.values()),
        *(Cell(text) for text in (model_of(group[0]), *recipe_labels(config, families).values())),
        *(measured_cell(group, column, marks) for column in columns),
        *([Cell(str(len(group)), len(group))] if counted else []),
        Cell(name),
    ]
    return Row(cells, run=group[0].name if len(group) == 1 else None)


def _original_row(
    runs: Sequence[Run],
    columns: Sequence[Column],
    keys: dict[str, str],
    families: Sequence[str],
    marks: Marks,
    *,
    counted: bool,
) -> Row:
    blank = [Cell("")] * len(keys)
    recipe = [Cell(model_of(runs[0])), Cell("original"), *[Cell("")] * (len(families) - 1)]
    measured = [original_cell(runs, column, marks) for column in columns]
    return Row([*blank, *recipe, *measured, *[Cell("")] * (counted + 1)], original=True)


def _alike(groups: Sequence[Sequence[Run]], shown: Container[str]) -> list[str]:
    """Say in what runs differ whose rows show the same recipe.  shown: keys with a column."""
    found: dict[Any, list[Run]] = {}
    families = families_of(group[0].config for group in groups)
    for group in groups:
        run = group[0]
        labels = tuple(recipe_labels(run.config, families).values())
        found.setdefault((model_of(run), *labels), []).append(run)
    keys = dict.fromkeys(
        key
        for runs in found.values()
        for key in differing(runs)
        if key not in shown
        and not key.startswith("evaluation.")  # blank cells tell what was not measured
    )
    if not keys:
        return []
    named = [key for key in keys if not is_seed(key)] or list(keys)
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    advice = "--seeds merges them" if all(map(is_seed, named)) else f"--by {named[0]} shows it"
    return [f"Rows of the same recipe differ in {', '.join(named[:NAMED])}{more} ({advice})."]


def _values(group: Sequence[Run], column: Column) -> list[float]:
    found = [run.measures.get(column.key) for run in group]
    return [item.quantized for item in found if item is not None and item.quantized is not None]


def _all_numbers(rows: Sequence[Row], place: int) -> bool:
    cells = [row.cells[place] for row in rows if row.cells[place].text]
    return bool(cells) and all(cell.value is not None for cell in cells)
