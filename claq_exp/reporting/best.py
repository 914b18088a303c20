"""Which values of a column are bold: the best one, and those that it is not surely better than."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from claq_exp.reporting.cells import number
from claq_exp.reporting.collect import Run
from claq_exp.reporting.columns import Column
from claq_exp.reporting.intervals import Interval, mean_reach
from claq_exp.reporting.report_table import Cell, Row
from claq_exp.reporting.window_pairs import INTERVALS, window_interval

BY_SEEDS = (
    "Over seeds, all values whose 95 % interval (t, of the mean) overlaps the best one's are bold."
)
BY_WINDOWS = (
    "Of single runs, those are bold too whose perplexity or KL is not distinguishable from the "
    "best one's on these texts (paired bootstrap over windows)."
)


@dataclass(frozen=True)
class Candidate:
    """A cell that may be the best of its column, and the runs behind it."""

    cell: Cell
    runs: Sequence[Run]
    column: Column

    @property
    def value(self) -> float:
        """The number as it is read: cells that read alike are equally good."""
        return float(number(self.cell.value or 0.0, self.column.digits))

    def overlaps(self, best: Candidate) -> bool:
        """Tell whether the intervals of two means share a value; a single run has no width."""
        (low, high), (other_low, other_high) = self._ends(), best._ends()
        return low <= other_high and other_low <= high

    def _ends(self) -> tuple[float, float]:
        mean, reach = self.cell.value or 0.0, 0.0
        if self.cell.deviation is not None:
            reach = mean_reach(self.cell.deviation, self.cell.count)
        return mean - reach, mean + reach

    def like_on_windows(self, best: Candidate) -> bool:
        """Tell whether the windows of two single runs do not tell them apart."""
        if self.column.kind not in INTERVALS or len(self.runs) != 1 or len(best.runs) != 1:
            return False
        if self.column.key not in self.runs[0].measures:
            return False
        found = window_interval(best.runs[0], self.runs[0], self.column.key)
        return isinstance(found, Interval) and not found.better(self.column.better)


def mark_best(
    rows: Sequence[Row],
    columns: Sequence[Column | None],
    models: Sequence[str],
    runs: Sequence[Sequence[Sequence[Run]]],
) -> tuple[list[Row], list[str]]:
    """Return rows with the best cells of each column marked, per model, and notes on the rule.

    columns: the measure in each column, or None.  models: of each row.  runs: behind each cell.
    The original and incomplete means do not compete, nor does a lone value.
    """
    cells = [list(row.cells) for row in rows]
    rules: dict[str, None] = {}
    for place, column in enumerate(columns):
        if column is None or not column.better:
            continue
        for model in dict.fromkeys(models):
            field = {
                index: Candidate(row.cells[place], runs[index][place], column)
                for index, row in enumerate(rows)
                if models[index] == model and not row.original and _competes(row.cells[place])
            }
            if len(field) < 2:
                continue
            for index, rule in _best(field).items():
                cells[index][place] = replace(cells[index][place], best=True)
                rules |= {rule: None} if rule else {}
    marked = [replace(row, cells=own) for row, own in zip(rows, cells, strict=True)]
    if not any(cell.best for own in cells for cell in own):
        return marked, []
    measured = {run.config["model"]["name"] for row in runs for cell in row for run in cell}
    several = ", per model" if len(measured) > 1 else ""
    return marked, [f"Bold: best of its column{several}.", *rules]


def _best(field: dict[int, Candidate]) -> dict[int, str]:
    """Return the bold ones of a column, and the rule that made them so; empty for the best."""
    first = next(iter(field.values()))
    choose = min if first.column.better == "lower" else max
    leading = choose(field.values(), key=lambda one: one.cell.value or 0.0)
    bold = {}
    for index, one in field.items():
        if one.value == leading.value:
            bold[index] = ""
        elif one.cell.deviation is not None or leading.cell.deviation is not None:
            if one.overlaps(leading):
                bold[index] = BY_SEEDS
        elif one.like_on_windows(leading):
            bold[index] = BY_WINDOWS
    return bold


def _competes(cell: Cell) -> bool:
    return cell.value is not None and math.isfinite(cell.value) and not cell.mark
