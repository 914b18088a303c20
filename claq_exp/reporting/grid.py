"""A table of a report as data: what a renderer turns into Markdown, CSV, LaTeX or HTML."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell.

    text: as a person reads it, unescaped; empty where nothing was measured.  value: the number
    behind it, for sorting and for CSV, or None for words.  deviation: standard deviation over
    seeds.  count: runs that it stands for.  best: of its column.
    """

    text: str
    value: float | None = None
    deviation: float | None = None
    count: int = 1
    best: bool = False


@dataclass(frozen=True)
class Row:
    """Cells in the order of the columns.

    original: of the model before quantization.  run: name of the run behind it, where it is one.
    """

    cells: list[Cell]
    original: bool = False
    run: str | None = None


@dataclass(frozen=True)
class Grid:
    """A table.  footnotes: sentences below it, e.g. what a blank cell means."""

    title: str
    columns: list[str]
    numeric: list[bool]
    rows: list[Row]
    footnotes: list[str] = field(default_factory=list)
