"""Tables for the terminal: what is the same in all rows goes below, what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from claq_exp.reporting.report_table import Cell, ReportTable, Row

PADDING = 3  # of a column and its border
LEAST = 4  # columns that are always shown
NOTHING = "none"  # what a step that is left out is called
STAY = ("n", "verdict")
SPARE = ("activation bits", "model bits", "checkpoint, MB")  # no one compares runs by these first
BEHIND_VERDICT = ("A", "B", "windows")  # a difference, its interval and the verdict tell more


def slim(table: ReportTable, *, without: tuple[str, ...] = ()) -> ReportTable:
    """Return a table without the words that all rows share, which become a footnote.

    without: headings of columns to leave out altogether.
    """
    rows = [row for row in table.rows if not row.original]
    kept, same = [], []
    for place, heading in enumerate(table.headings()):
        texts = {row.cells[place].text for row in rows}
        is_shared = not table.numeric[place] and len(rows) > 1 and len(texts) == 1
        if is_shared and any(texts):
            same.append(f"{heading} {next(iter(texts))}")
        if heading not in without and not is_shared:
            kept.append(place)
    if all(table.numeric[place] for place in kept) and 0 not in kept:
        kept.insert(0, 0)  # the original has to be told from the rest
    smaller = _select(table, kept)
    notes = [f"In all rows: {', '.join(same)}."] if same else []
    return replace(_named_original(smaller), footnotes=[*smaller.footnotes, *notes])


def to_terminal(table: ReportTable, width: int, where: str = "") -> list[Table]:
    """Return tables that fit a terminal, one below the other: one for each group of columns.

    One recipe beside its original that does not fit has a row for each number in place of a column.
    Words that leave no place for any number go into one column.

    width: of the terminal, in characters.  where: file that has the columns which do not fit.
    """
    names = [name for name in dict.fromkeys(table.groups) if name]
    originals = [row.original for row in table.rows]
    if not names and sorted(originals) == [False, True] and _width(table) > width:
        return [_table(_fitting(_upright(table), width, where), width)]
    if not names:
        fitting = _fitting(table, width, where)
        if any(table.numeric) and not any(fitting.numeric):
            fitting = _fitting(_in_one_column(table), width, where)
        return [_table(fitting, width)]
    drawn_all = []
    for name in names:
        places = [place for place, group in enumerate(table.groups) if group in ("", name)]
        notes = table.footnotes if name == names[-1] else []
        own = replace(_select(table, places), groups=[], footnotes=notes)
        drawn = _table(_fitting(own, width, where), width)
        drawn.title, drawn.title_justify, drawn.title_style = escape(name), "left", "bold"
        drawn_all.append(drawn)
    return drawn_all


def _upright(table: ReportTable) -> ReportTable:
    """Return a table of an original and one recipe with a row for each number.

    The words of the recipe become a footnote.
    """
    before, after = sorted(table.rows, key=lambda row: not row.original)
    rows, words = [], []
    for place, heading in enumerate(table.headings()):
        cell = after.cells[place]
        if table.numeric[place]:
            rows.append(Row([Cell(heading), before.cells[place], cell]))
        elif cell.text:
            words.append(f"{heading} {cell.text}")
    notes = [*table.footnotes, *([f"Of {', '.join(words)}."] if words else [])]
    columns, numeric = ["", "original", "quantized"], [False, True, True]
    return ReportTable(table.title, columns, numeric, rows, notes)


def _width(table: ReportTable) -> int:
    return 1 + sum(PADDING + _longest(table, place) for place in range(len(table.columns)))


def _in_one_column(table: ReportTable) -> ReportTable:
    """Return a table whose columns of words are one, in front of the numbers, without `none`."""
    numbers = [place for place, is_number in enumerate(table.numeric) if is_number]
    words = [place for place in range(len(table.columns)) if place not in numbers]
    smaller, rows = _select(table, numbers), []
    for row, few in zip(table.rows, smaller.rows, strict=True):
        texts = [row.cells[place].text for place in words]
        text = ", ".join(word for word in texts if word not in ("", NOTHING))
        rows.append(replace(few, cells=[Cell(text), *few.cells]))
    heading = ", ".join(table.headings()[place] for place in words)
    return replace(
        smaller, columns=[heading, *smaller.columns], numeric=[False, *smaller.numeric], rows=rows
    )


def _table(table: ReportTable, width: int) -> Table:
    drawn = Table(header_style="bold", title=None)
    columns = zip(table.headings(), *(row.cells for row in table.rows), strict=True)
    longest = [max(len(head), *(len(cell.text) for cell in cells)) for head, *cells in columns]
    is_narrow = 1 + sum(PADDING + length for length in longest) > width
    for place, (heading, is_number) in enumerate(zip(table.headings(), table.numeric, strict=True)):
        side: Any = "right" if is_number else "left"
        is_whole = is_number or (is_narrow and heading in STAY)
        least = min(_longest(table, place), width // 2) if is_whole else None
        drawn.add_column(escape(heading), justify=side, overflow="fold", width=least)
    for row in table.rows:
        drawn.add_row(*map(_cell, row.cells), style="dim" if row.original else None)
    if table.footnotes:
        drawn.caption = escape("\n".join(table.footnotes))
        drawn.caption_justify = "left"
    return drawn


def _fitting(table: ReportTable, width: int, where: str) -> ReportTable:
    """Return a table without the columns that do not fit: sizes go first, then the last ones.

    The number of seeds stays, for it tells what a mean is worth, and so does a verdict.
    """
    widths = [PADDING + _longest(table, place) for place in range(len(table.columns))]
    kept = list(range(len(widths)))
    headings = table.headings()
    wanted_least = BEHIND_VERDICT if "verdict" in headings else SPARE
    spare = [place for place in kept if headings[place] in wanted_least]
    while 1 + sum(widths[place] for place in kept) > width and len(kept) > LEAST:
        last = next(place for place in reversed(kept) if headings[place] not in STAY)
        kept.remove(spare.pop() if spare else last)
    left = len(widths) - len(kept)
    if not left:
        return table
    note = f"{left} more column{'s' * (left > 1)}{f' in {where}' if where else ''}."
    return replace(_select(table, kept), footnotes=[*table.footnotes, note])


def _longest(table: ReportTable, place: int) -> int:
    """Return the length of a column's longest number, or word of its heading or of its cells."""
    texts = [row.cells[place].text + row.cells[place].mark for row in table.rows]
    words = texts if table.numeric[place] else [word for text in texts for word in text.split()]
    return max(map(len, [*table.headings()[place].split(), *words]), default=0)


def _cell(cell: Cell) -> str:
    text = f"[bold]{escape(cell.text)}[/bold]" if cell.best else escape(cell.text)
    return text + (f"({cell.mark})" if cell.mark else "")


def _select(table: ReportTable, places: list[int]) -> ReportTable:
    return replace(
        table,
        columns=[table.columns[place] for place in places],
        numeric=[table.numeric[place] for place in places],
        groups=[table.groups[place] for place in places] if table.groups else [],
        rows=[replace(row, cells=[row.cells[place] for place in places]) for row in table.rows],
    )


def _named_original(table: ReportTable) -> ReportTable:
    """Write `original` into the first column of words of its row, where that has gone."""
    free = next((place for place, number in enumerate(table.numeric) if not number), None)

    def named(row: Row) -> Row:
        if free is None or not row.original or any(c.text == "original" for c in row.cells):
            return row
        text = " ".join(filter(None, (row.cells[free].text, "original")))
        return replace(
            row,
            cells=[*row.cells[:free], replace(row.cells[free], text=text), *row.cells[free + 1 :]],
        )

    return replace(table, rows=[named(row) for row in table.rows])
