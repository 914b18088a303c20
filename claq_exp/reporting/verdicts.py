"""Whether a difference of two runs, or of two groups of seeds, is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claq_exp.errors import ConfigError
from claq_exp.reporting.cells import NOT_FINITE, NOT_MEASURED, Marks, measured_cell, number
from claq_exp.reporting.collect import Run, collect, is_run_folder, read_run
from claq_exp.reporting.columns import QUALITY, Column, known_columns, same_content
from claq_exp.reporting.intervals import RESAMPLES, Interval, seed_interval
from claq_exp.reporting.report_table import Cell, ReportTable, Row
from claq_exp.reporting.runs_table import finished_runs
from claq_exp.reporting.settings import (
    NAMED,
    check_seeds_only,
    differing,
    flatten,
    is_seed,
    seedless,
)
from claq_exp.reporting.window_pairs import INTERVALS, OTHER, window_interval

SAME = "not distinguishable"
OVER_WINDOWS = ["", "B against A", "95 % interval", "windows", "verdict"]
OVER_SEEDS = ["", "A", "B", "B - A", "95 % interval", "n", "verdict"]
ABOUT_WINDOWS = (
    f"Paired bootstrap over evaluation windows, {RESAMPLES:,} resamples, always the same. The "
    "interval covers the choice of the text, not that of the seed: another seed of the same recipe "
    "can move a number by more (seeds=0,1,2 and two folders tell)."
)
ABOUT_SEEDS = (
    "B - A is the mean over pairs of runs with the same seed, with its 95 % t interval. It covers "
    "the seed, on these texts."
)


def window_verdicts(one: Run, two: Run) -> ReportTable:
    """Return perplexity and KL of B against A over the same windows: interval and verdict."""
    marks, rows = Marks(), []
    for key, measure in one.measures.items():
        if measure.kind not in INTERVALS or key not in two.measures:
            continue
        if ", after " in measure.label:  # of a stage: its windows are not kept
            continue
        found = window_interval(one, two, key)
        if isinstance(found, str):
            rows.append(Row([Cell(measure.label), Cell("", mark=marks.of(found)), *[Cell("")] * 3]))
            continue
        shown = [f"{_percent(found.low)} to {_percent(found.high)}", str(found.count)]
        rows.append(
            Row(
                [
                    Cell(measure.label),
                    Cell(_percent(found.value), found.value),
                    Cell(shown[0]),
                    Cell(shown[1], found.count),
                    Cell(_verdict(found, measure.better)),
                ]
            )
        )
    known = any(row.cells[1].text for row in rows)
    notes = [*marks.footnotes(), *[ABOUT_WINDOWS] * known, *_bits_note([one], [two])]
    numeric = [False, True, False, True, False]
    return ReportTable("Is the difference more than chance?", OVER_WINDOWS, numeric, rows, notes)


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %" if abs(share) < 10 else f"{100 * share:+,.0f} %"


def _verdict(found: Interval, direction: str) -> str:
    better = found.better(direction)
    return f"{better} is better" if better else SAME


def _bits_note(first: Sequence[Run], second: Sequence[Run]) -> list[str]:
    """Say so where bits are not equal: a better number may be bought."""
    own = [", ".join(dict.fromkeys(_bits(run) for run in runs)) for runs in (first, second)]
    if own[0] == own[1]:
        return []
    return [f"A has {own[0]} linear bits, B {own[1]}."]


def _bits(run: Run) -> str:
    return number(run.measures["bits.linear"].quantized or 0.0, 2)


def runs_of(folder: Path, *, seeds: bool) -> list[Run]:
    """Return the run of a folder, or the finished runs below it, which differ in seeds only.

    seeds: of a run's folder, those beside it that differ from it in seeds only too.
    Raises ConfigError where there is none, or where they differ in more.
    """
    if is_run_folder(folder):
        run = read_run(folder)
        if not seeds:
            return [run]
        below = collect([folder.resolve().parent]).finished
        return [other for other in below if seedless(other) == seedless(run)]
    runs = finished_runs(collect([folder]))
    if others := [key for key in differing(runs) if not is_seed(key)]:
        named = ", ".join(others[:NAMED])
        raise ConfigError(
            f"report: the runs below {folder} differ in {named}; --compare takes runs that differ "
            "in seeds only: give the folder of one run of each kind, and add --seeds"
        )
    check_seeds_only(runs, str(folder), "give one of their folders")
    return runs


def seed_verdicts(first: Sequence[Run], second: Sequence[Run]) -> ReportTable:
    """Return every measure of two groups of seeds: means, paired difference, interval, verdict.

    Raises ConfigError where fewer than two seeds are in both groups.
    """
    pairs, left = _pairs(first, second)
    one, two = ([pair[place] for pair in pairs] for place in (0, 1))
    marks, rows = Marks(), []
    for column in known_columns([*one, *two]):
        if column.kind in ("bits", *QUALITY):
            rows.append(_seed_row(one, two, column, marks))
    notes = [*marks.footnotes(), "± is the sample standard deviation over n seeds.", ABOUT_SEEDS]
    if left:
        notes.append(f"Left out, for their seed is in one group only: {', '.join(left)}.")
    notes += _bits_note(one, two)
    numeric = [False, True, True, True, False, True, False]
    return ReportTable("Is the difference more than chance?", OVER_SEEDS, numeric, rows, notes)


def _pairs(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[tuple[Run, Run]], list[str]]:
    """Return the runs of both groups with the same seeds, and the names of the others."""
    keys = [key for key in dict.fromkeys([*differing(first), *differing(second)]) if is_seed(key)]
    own = [{_seeds(run, keys): run for run in group} for group in (first, second)]
    shared = [seeds for seeds in own[0] if seeds in own[1]]
    if len(shared) < 2:
        raise ConfigError(
            f"report: --compare found {len(first)} and {len(second)} runs, and {len(shared)} seeds "
            "that are in both groups; it takes two seeds at least: seeds=0,1,2 runs three"
        )
    left = [run.name for runs in own for seeds, run in runs.items() if seeds not in shared]
    return [(own[0][seeds], own[1][seeds]) for seeds in shared], left


def _seeds(run: Run, keys: Sequence[str]) -> tuple[Any, ...]:
    flat = flatten(run.config)
    return tuple(flat.get(key) for key in keys)


def _seed_row(one: Sequence[Run], two: Sequence[Run], column: Column, marks: Marks) -> Row:
    cells = [Cell(column.label), *(measured_cell(runs, column, marks) for runs in (one, two))]
    found = [[run.measures.get(column.key) for run in runs] for runs in (one, two)]
    known = [(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None]
    if len(known) < len(one):
        return Row([*cells, Cell("", mark=marks.of(NOT_MEASURED)), *[Cell("")] * 3])
    if not all(same_content(a.content, b.content) for a, b in known):
        return Row([*cells, Cell("", mark=marks.of(OTHER)), *[Cell("")] * 3])
    values = [(a.quantized, b.quantized) for a, b in known]
    interval = seed_interval([b - a for a, b in values if a is not None and b is not None])
    if interval is None or interval.count < len(values):
        return Row([*cells, Cell("", mark=marks.of(NOT_FINITE)), *[Cell("")] * 3])
    low, high = (_signed(end, column.digits) for end in (interval.low, interval.high))
    return Row(
        [
            *cells,
            Cell(_signed(interval.value, column.digits), interval.value),
            Cell(f"{low} to {high}"),
            Cell(str(interval.count), interval.count),
            Cell(_verdict(interval, column.better) if column.better else ""),
        ]
    )


def _signed(value: float, digits: int) -> str:
    return f"{'+' if value > 0 else ''}{number(value, digits)}"
