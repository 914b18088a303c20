"""A table of a report as data: what a renderer turns into Markdown, CSV, LaTeX or HTML."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell.

    text: as a person reads it, unescaped; empty where nothing was measured.  value: the number
    behind it, for sorting and for CSV, or None for words.  deviation: sample standard deviation
    over seeds.  count: runs that it stands for.  best: of its column.  mark: letter of the footnote
    that says why the cell is blank, or what it leaves out.
    """

    text: str
    value: float | None = None
    deviation: float | None = None
    count: int = 1
    best: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """Cells in the order of the columns.

    original: of the model before quantization.  run: name of the run behind it, where it is one.
    """

    cells: list[Cell]
    original: bool = False
    run: str | None = None


@dataclass(frozen=True)
class ReportTable:
    """A table.

    columns: headings.  numeric: whether a column holds numbers.  footnotes: sentences below it; one
    that begins with a letter and a colon belongs to the cells with that mark.  groups: a heading
    above each column, empty for none; equal neighbours stand together.
    """

    title: str
    columns: list[str]
    numeric: list[bool]
    rows: list[Row]
    footnotes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def headings(self) -> list[str]:
        """Return the headings in one line each, with the group in front."""
        groups = self.groups or [""] * len(self.columns)
        pairs = zip(groups, self.columns, strict=True)
        return [f"{group}: {column}" if group else column for group, column in pairs]
