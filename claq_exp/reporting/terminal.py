"""Tables for the terminal: what is the same in all rows goes below, what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from claq_exp.reporting.grid import Cell, Grid, Row

PADDING = 3  # of a column and its border
LEAST = 4  # columns that are always shown
SPARE = ("model bits", "checkpoint, MB")  # no one compares runs by these first


def slim(grid: Grid, *, without: tuple[str, ...] = ()) -> Grid:
    """Return a table without the words that all rows share, which become a footnote.

    without: headings of columns to leave out altogether.
    """
    rows = [row for row in grid.rows if not row.original]
    kept, same = [], []
    for place, heading in enumerate(grid.headings()):
        texts = {row.cells[place].text for row in rows}
        is_shared = not grid.numeric[place] and len(rows) > 1 and len(texts) == 1
        if is_shared and any(texts):
            same.append(f"{heading} {next(iter(texts))}")
        if heading not in without and not is_shared:
            kept.append(place)
    if all(grid.numeric[place] for place in kept) and 0 not in kept:
        kept.insert(0, 0)  # the original has to be told from the rest
    smaller = _select(grid, kept)
    notes = [f"In all rows: {', '.join(same)}."] if same else []
    return replace(_named_original(smaller), footnotes=[*smaller.footnotes, *notes])


def to_terminal(grid: Grid, width: int, where: str = "") -> list[Table]:
    """Return tables that fit a terminal, one below the other: one for each group of columns.

    width: of the terminal, in characters.  where: file that has the columns which do not fit.
    """
    names = [name for name in dict.fromkeys(grid.groups) if name]
    if not names:
        return [_table(grid, width, where)]
    tables = []
    for name in names:
        places = [place for place, group in enumerate(grid.groups) if group in ("", name)]
        notes = grid.footnotes if name == names[-1] else []
        table = _table(replace(_select(grid, places), groups=[], footnotes=notes), width, where)
        table.title, table.title_justify, table.title_style = escape(name), "left", "bold"
        tables.append(table)
    return tables


def _table(grid: Grid, width: int, where: str) -> Table:
    grid = _fitting(grid, width, where)
    table = Table(header_style="bold", title=None)
    for place, (heading, is_number) in enumerate(zip(grid.headings(), grid.numeric, strict=True)):
        side: Any = "right" if is_number else "left"
        least = min(_longest(grid, place), width // 2) if is_number else None
        table.add_column(escape(heading), justify=side, overflow="fold", width=least)
    for row in grid.rows:
        table.add_row(*map(_cell, row.cells), style="dim" if row.original else None)
    if grid.footnotes:
        table.caption = escape("\n".join(grid.footnotes))
        table.caption_justify = "left"
    return table


def _fitting(grid: Grid, width: int, where: str) -> Grid:
    """Return a table without the columns that do not fit: sizes go first, then the last ones."""
    widths = [PADDING + _longest(grid, place) for place in range(len(grid.columns))]
    kept = list(range(len(widths)))
    spare = [place for place in kept if grid.headings()[place] in SPARE]
    while 1 + sum(widths[place] for place in kept) > width and len(kept) > LEAST:
        kept.remove(spare.pop() if spare else kept[-1])
    left = len(widths) - len(kept)
    if not left:
        return grid
    note = f"{left} more column{'s' * (left > 1)}{f' in {where}' if where else ''}."
    return replace(_select(grid, kept), footnotes=[*grid.footnotes, note])


def _longest(grid: Grid, place: int) -> int:
    """Return the length of a column's longest number, or word of its heading or of its cells."""
    texts = [row.cells[place].text + row.cells[place].mark for row in grid.rows]
    words = texts if grid.numeric[place] else [word for text in texts for word in text.split()]
    return max(map(len, [*grid.headings()[place].split(), *words]), default=0)


def _cell(cell: Cell) -> str:
    text = f"[bold]{escape(cell.text)}[/bold]" if cell.best else escape(cell.text)
    return text + (f"({cell.mark})" if cell.mark else "")


def _select(grid: Grid, places: list[int]) -> Grid:
    return replace(
        grid,
        columns=[grid.columns[place] for place in places],
        numeric=[grid.numeric[place] for place in places],
        groups=[grid.groups[place] for place in places] if grid.groups else [],
        rows=[replace(row, cells=[row.cells[place] for place in places]) for row in grid.rows],
    )


def _named_original(grid: Grid) -> Grid:
    """Write `original` into the first column of words of its row, where that has gone."""
    free = next((place for place, number in enumerate(grid.numeric) if not number), None)

    def named(row: Row) -> Row:
        if free is None or not row.original or any(c.text == "original" for c in row.cells):
            return row
        text = " ".join(filter(None, (row.cells[free].text, "original")))
        return replace(
            row,
            cells=[*row.cells[:free], replace(row.cells[free], text=text), *row.cells[free + 1 :]],
        )

    return replace(grid, rows=[named(row) for row in grid.rows])
