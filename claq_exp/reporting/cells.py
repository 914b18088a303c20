"""Cells of measures: a number, a mean over seeds, or the reason why there is none."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase

from claq_exp.reporting.collect import Run
from claq_exp.reporting.columns import GIVEN, Column
from claq_exp.reporting.report_table import Cell

NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"
HUGE = 1e6  # from here in powers of ten


@dataclass
class Marks:
    """Letters for the reasons below a table, in the order in which they are first needed."""

    reasons: dict[str, str] = field(default_factory=dict)

    def of(self, reason: str) -> str:
        """Return the letter of a reason: a to z, then aa, ab and so on."""
        if reason not in self.reasons:
            place, letters = len(self.reasons), len(ascii_lowercase)
            before = ascii_lowercase[place // letters - 1] if place >= letters else ""
            self.reasons[reason] = before + ascii_lowercase[place % letters]
        return self.reasons[reason]

    def footnotes(self) -> list[str]:
        """Return a line for each reason."""
        return [f"{letter}: {reason}." for reason, letter in self.reasons.items()]


def measured_cell(runs: Sequence[Run], column: Column, marks: Marks) -> Cell:
    """Return a measure of one run, or mean and sample standard deviation over seeds.

    Values that are not finite stay out of a mean, with a mark that says so.
    """
    found = [run.measures.get(column.key) for run in runs]
    present = [measure for measure in found if measure is not None]
    values = [measure.quantized for measure in present if measure.quantized is not None]
    infinite = len(present) - len(values)
    if not values:
        return Cell("", mark=marks.of(NOT_FINITE if infinite else NOT_MEASURED))
    mark = marks.of(f"{NOT_FINITE} in {infinite} of {len(runs)} runs, left out") if infinite else ""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    text = number(mean, column.digits)
    is_given = column.kind in GIVEN and not float(f"{deviation or 0.0:.{column.digits}f}")
    if deviation is not None and not is_given:
        text += f" ± {number(deviation, column.digits)}"
    if len(values) < len(runs):
        text += f" (n={len(values)})"
    return Cell(text, mean, deviation, len(values), mark=mark)


def original_cell(runs: Sequence[Run], column: Column, marks: Marks) -> Cell:
    """Return a measure of the model before quantization, as its runs found it."""
    found = [run.measures.get(column.key) for run in runs]
    values = [
        measure.original
        for measure in found
        if measure is not None and measure.original is not None
    ]
    if not values:
        return Cell("", mark=marks.of(NOT_MEASURED))
    least, most = (number(value, column.digits) for value in (min(values), max(values)))
    mark = marks.of(f"{least} to {most}, as runs measured it") if least != most else ""
    return Cell(number(values[0], column.digits), values[0], mark=mark)


def number(value: float, digits: int) -> str:
    """Return a number with so many decimals, or two significant digits where they show nothing."""
    if abs(value) >= HUGE:
        return f"{value:.2e}"
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}" if abs(value) < 1e-6 else f"{value:.2g}"
    return f"{value:.{digits}f}"


def standard_errors(runs: Sequence[Run], columns: Sequence[Column]) -> list[str]:
    """Return a note on how sure the scores of tasks are."""
    errors = [
        measure.stderr
        for run in runs
        for measure in run.measures.values()
        if measure.kind == "accuracy" and measure.stderr
    ]
    if not errors or not any(column.kind == "accuracy" for column in columns):
        return []
    return [f"Standard error of an accuracy over the task's rows: up to {max(errors):.1f} points."]
