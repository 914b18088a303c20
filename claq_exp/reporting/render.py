"""Tables as Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import html
import io
import re
from itertools import groupby
from typing import Any

from claq_exp.reporting.report_table import Cell, ReportTable, Row

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after a line break it would be an option
    "]": "{]}",
    "±": r"$\pm$",
}


def to_markdown(table: ReportTable) -> str:
    """Return a GitHub table with its footnotes below; best in bold, marks raised."""
    lines = [_markdown_line([escaped(heading) for heading in table.headings()])]
    lines.append(_markdown_line(["---:" if number else "---" for number in table.numeric]))
    lines += [_markdown_line([_markdown_cell(cell) for cell in row.cells]) for row in table.rows]
    notes = [line for note in table.footnotes for line in ("", escaped(note))]
    return "\n".join([*lines, *notes]) + "\n"


def to_csv(table: ReportTable) -> str:
    """Return `plain_rows` as CSV: plain numbers, empty where there is none."""
    header, rows = plain_rows(table)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([_plain(value) for value in row])
    return text.getvalue()


def plain_rows(table: ReportTable) -> tuple[list[str], list[list[Any]]]:
    """Return headings and rows for machines: numbers, words, and None where there is no number.

    Standard deviations and counts are columns of their own, `HEADING std` and `HEADING n`, where a
    column has any; the last column, `original`, tells the models before quantization.
    """
    places = range(len(table.columns))
    spread = [any(row.cells[place].deviation is not None for row in table.rows) for place in places]
    header: list[str] = []
    for heading, wide in zip(table.headings(), spread, strict=True):
        header += [heading, f"{heading} std", f"{heading} n"] if wide else [heading]
    rows = []
    for row in table.rows:
        values: list[Any] = []
        for place in places:
            cell = row.cells[place]
            values.append(cell.value if table.numeric[place] else cell.text)
            if spread[place]:
                counts = cell.value is not None and not row.original
                values += [cell.deviation, cell.count if counts else None]
        rows.append([*values, row.original])
    return [*header, "original"], rows


def to_latex(table: ReportTable) -> str:
    """Return a table for the package booktabs, footnotes under it, all names escaped."""
    align = "".join("r" if number else "l" for number in table.numeric)
    body = [_latex_row([_latex_cell(cell) for cell in row.cells]) for row in table.rows]
    originals = sum(row.original for row in table.rows)
    if 0 < originals < len(body) and all(row.original for row in table.rows[:originals]):
        body.insert(originals, r"\midrule")
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(table.title)}}}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        *_latex_groups(table),
        _latex_row([_latex(heading) for heading in table.columns]),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if table.footnotes:
        lines += ["", r"\smallskip", r"\begin{minipage}{\linewidth}", r"\footnotesize"]
        lines += [rf"{_latex(note)}\par" for note in table.footnotes]
        lines.append(r"\end{minipage}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def to_html(table: ReportTable) -> str:
    """Return a <table>: `data-value` for sorting, classes number, best and original.

    A row of one run has its name as `data-run`.  Footnotes are the table's foot.
    """
    rows = "\n".join(_html_row(table, row) for row in table.rows)
    head = "".join(
        f'<th scope="col"{_html_class(["number"] if number else [])}>{html.escape(heading)}</th>'
        for heading, number in zip(table.columns, table.numeric, strict=True)
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.footnotes)
    foot = f'<tfoot><tr><td colspan="{len(table.columns)}">{notes}</td></tr></tfoot>\n'
    return (
        f'<table class="grid">\n<caption>{html.escape(table.title)}</caption>\n'
        f"<thead>\n{_html_groups(table)}<tr>{head}</tr>\n</thead>\n<tbody>\n{rows}\n</tbody>\n"
        f"{foot if notes else ''}</table>\n"
    )


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else repr(value).lower()


def _markdown_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    text = escaped(cell.text)
    mark = f"<sup>{cell.mark}</sup>" if cell.mark else ""
    return (f"**{text}**" if cell.best else text) + mark


def escaped(text: str) -> str:
    """Escape what Markdown would take for itself; underscores inside words it leaves alone."""
    text = re.sub(r"([\\|*`<>\[\]~])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _latex_cell(cell: Cell) -> str:
    text = _latex(cell.text)
    if cell.value is not None and text.startswith("-"):
        text = f"$-${text[1:]}"
    text = rf"\textbf{{{text}}}" if cell.best else text
    return text + (rf"\textsuperscript{{{cell.mark}}}" if cell.mark else "")


def _latex_row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_groups(table: ReportTable) -> list[str]:
    if not any(table.groups):
        return []
    cells, rules, place = [], [], 1
    for name, width in _spans(table):
        cells.append(
            rf"\multicolumn{{{width}}}{{c}}{{{_latex(name)}}}" if name else " & " * (width - 1)
        )
        if name:
            rules.append(rf"\cmidrule(lr){{{place}-{place + width - 1}}}")
        place += width
    return [_latex_row(cells), "".join(rules)]


def _spans(table: ReportTable) -> list[tuple[str, int]]:
    """Return each group's heading and its number of columns, from the left."""
    return [(name, len(list(columns))) for name, columns in groupby(table.groups)]


def _html_groups(table: ReportTable) -> str:
    if not any(table.groups):
        return ""
    cells = [
        f'<th scope="colgroup" colspan="{width}">{html.escape(name)}</th>'
        if name
        else f'<td colspan="{width}"></td>'
        for name, width in _spans(table)
    ]
    return f"<tr>{''.join(cells)}</tr>\n"


def _html_row(table: ReportTable, row: Row) -> str:
    cells = []
    for cell, is_number in zip(row.cells, table.numeric, strict=True):
        classes = ["number"] * is_number + ["best"] * cell.best
        value = "" if cell.value is None else f' data-value="{cell.value!r}"'
        mark = f"<sup>{cell.mark}</sup>" if cell.mark else ""
        cells.append(f"<td{_html_class(classes)}{value}>{html.escape(cell.text)}{mark}</td>")
    run = f' data-run="{html.escape(row.run)}"' if row.run else ""
    return f"<tr{_html_class(['original'] * row.original)}{run}>{''.join(cells)}</tr>"


def _html_class(classes: list[str]) -> str:
    return f' class="{" ".join(classes)}"' if classes else ""
