"""The same table in four forms: nothing lost, nothing unescaped, parsed back to check."""

from __future__ import annotations

import io
import re
import shutil
import string
import subprocess

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import html

from claq_exp.reporting.render import to_csv, to_html, to_latex, to_markdown
from claq_exp.reporting.report_table import Cell, ReportTable, Row
from claq_exp.reporting.terminal import slim, to_terminal

TABLE = ReportTable(
    title="bits & names_",
    columns=["recipe", "linear bits", "words perplexity", "linear bits", "words perplexity"],
    numeric=[False, True, True, True, True],
    rows=[
        Row([Cell("original"), *[Cell("16.00", 16.0), Cell("20.00", 20.0)] * 2], original=True),
        Row(
            [
                Cell("k_means|a <b> & 50% #1"),
                Cell("2.30", 2.3, count=3),
                Cell("25.25 ± 0.50", 25.2468, deviation=0.5, count=3, best=True),
                Cell("", mark="a"),
                Cell("", mark="a"),
            ],
            run="run-1",
        ),
        Row(
            [Cell("x"), Cell("4.00", 4), Cell("26.00", 26.0), Cell("-1.00", -1.0), Cell("7", 7)],
            run='run "2"',
        ),
    ],
    footnotes=["a: failed: 100 % of {memory}.", "Bold: best of its column."],
    groups=["", "no OR", "no OR", "OR 0.5_%", "OR 0.5_%"],
)


def test_markdown_is_a_table_of_one_width_with_bold_marks_and_escapes():
    lines = to_markdown(TABLE).splitlines()
    assert lines[0] == (
        "| recipe | no OR: linear bits | no OR: words perplexity | OR 0.5\\_%: linear bits | "
        "OR 0.5\\_%: words perplexity |"
    )
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| original | 16.00 | 20.00 | 16.00 | 20.00 |"
    assert lines[3] == (
        "| k_means\\|a \\<b\\> & 50% #1 | 2.30 | **25.25 ± 0.50** | <sup>a</sup> | <sup>a</sup> |"
    )
    assert lines[5:] == ["", "a: failed: 100 % of {memory}.", "", "Bold: best of its column."]


@pytest.mark.case(100)
def test_markdown_reads_back_through_a_markdown_parser():
    from markdown_it import MarkdownIt

    text = MarkdownIt("gfm-like", {"linkify": False}).render(to_markdown(TABLE))
    table = html.fragment_fromstring(text, create_parent="div").find("table")
    rows = [[cell.text_content() for cell in row] for row in table.iter("tr")]
    assert rows[0] == TABLE.headings()
    assert [row[0] for row in rows[1:]] == ["original", "k_means|a <b> & 50% #1", "x"]
    assert [cell.text for cell in table.iter("strong")] == ["25.25 ± 0.50"]


def test_csv_reads_back_as_numbers_with_deviation_and_count_apart():
    frame = pd.read_csv(io.StringIO(to_csv(TABLE)))
    assert list(frame.columns) == [
        "recipe",
        "no OR: linear bits",
        "no OR: words perplexity",
        "no OR: words perplexity std",
        "no OR: words perplexity n",
        "OR 0.5_%: linear bits",
        "OR 0.5_%: words perplexity",
        "original",
    ]
    assert frame["original"].tolist() == [True, False, False]
    assert frame["recipe"].tolist() == ["original", "k_means|a <b> & 50% #1", "x"]
    runs = frame[~frame["original"]]
    assert runs["no OR: words perplexity"].tolist() == [25.2468, 26.0]
    assert runs["no OR: words perplexity std"].tolist()[0] == 0.5
    assert runs["no OR: words perplexity n"].tolist() == [3, 1]
    assert runs["OR 0.5_%: linear bits"].isna().tolist() == [True, False]
    assert all(pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns[1:-1])


def test_a_word_in_a_column_of_numbers_stays_out_of_csv():
    table = ReportTable(
        "t", ["bits"], [True], [Row([Cell("original")], original=True), Row([Cell("3", 3)])]
    )
    assert to_csv(table) == "bits,original\n,true\n3,false\n"


def latex_cells(line: str) -> list[str]:
    assert line.endswith(r" \\")
    cells = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
    return [cell.strip() for cell in cells]


def check_latex(text: str) -> list[str]:
    """Check braces, environments, dollars and columns; return the lines inside the tabular."""
    bare = re.sub(r"\\[\\{}$&#%_]", "", re.sub(r"^%.*$", "", text, flags=re.MULTILINE))
    assert "%" not in bare
    assert "#" not in bare
    depth = 0
    for letter in bare:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    open_: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            open_.append(name)
        else:
            assert open_.pop() == name
    assert open_ == []
    (align,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    inside = text.partition(r"\begin{tabular}")[2].partition(r"\end{tabular}")[0].splitlines()[1:]
    rows = [line for line in inside if line.endswith(r"\\")]
    for row in rows:
        spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", row)]
        assert len(latex_cells(row)) + sum(spans) - len(spans) == len(align)
        assert "_" not in re.sub(r"\\_", "", row)
    return [line for line in inside if line.startswith("\\") and not line.endswith(r"\\")] + rows


def test_latex_has_booktabs_rules_groups_bold_marks_and_footnotes():
    text = to_latex(TABLE)
    check_latex(text)
    lines = text.splitlines()
    assert r"\caption{bits \& names\_}" in lines
    assert (
        r" & \multicolumn{2}{c}{no OR} & \multicolumn{2}{c}{OR 0.5\_\%} \\"
        "\n"
        r"\cmidrule(lr){2-3}\cmidrule(lr){4-5}" in text
    )
    assert [line for line in lines if "rule" in line and "cmidrule" not in line] == [
        r"\toprule",
        r"\midrule",
        r"\midrule",
        r"\bottomrule",
    ]
    assert (
        r"k\_means\textbar{}a \textless{}b\textgreater{} \& 50\% \#1 & 2.30 & "
        r"\textbf{25.25 $\pm$ 0.50} & \textsuperscript{a} & \textsuperscript{a} \\" in lines
    )
    assert r"x & 4.00 & 26.00 & $-$1.00 & 7 \\" in lines
    assert r"a: failed: 100 \% of \{memory\}.\par" in lines
    assert text.index(r"\end{tabular}") < text.index("a: failed")


@pytest.mark.case(100)
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles_whatever_names_hold(tmp_path):
    odd = ReportTable(
        f"all of {string.printable.strip()}",
        ["[x]", "*", "n"],
        [False, False, True],
        [
            Row([Cell("[1mm] a"), Cell("*"), Cell("1", 1)], original=True),
            Row([Cell(r"\input{x} $x^2$"), Cell("“ü” ±"), Cell("-2 ± 1", -2, best=True)]),
        ],
        ["a: [x]."],
    )
    text = "".join(to_latex(table) for table in (TABLE, odd))
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
        f"{text}\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "all.pdf").stat().st_size > 1000


@pytest.mark.case(100)
def test_html_has_values_to_sort_by_classes_and_everything_escaped():
    text = to_html(TABLE)
    table = html.fragment_fromstring(text)
    assert table.tag == "table"
    assert "<b>" not in text
    head = [[cell.text_content() for cell in row] for row in table.find("thead")]
    assert head == [["", "no OR", "OR 0.5_%"], TABLE.columns]
    assert [cell.get("colspan") for cell in table.find("thead")[0]] == ["1", "2", "2"]
    original, first, second = table.find("tbody")
    assert original.get("class") == "original"
    assert first.get("data-run") == "run-1"
    assert second.get("data-run") == 'run "2"'
    assert [cell.get("data-value") for cell in first] == [None, "2.3", "25.2468", None, None]
    assert [cell.get("class") for cell in first] == [
        None,
        "number",
        "number best",
        "number",
        "number",
    ]
    assert first[0].text == "k_means|a <b> & 50% #1"
    assert first[3].find("sup").text == "a"
    assert [note.text for note in table.find("tfoot").iter("p")] == TABLE.footnotes


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


@pytest.mark.case(100)
@given(st.lists(WORDS, min_size=3, max_size=3), st.floats(allow_nan=False, allow_infinity=False))
def test_any_words_and_any_number_survive_every_form(words, value):
    name, other, note = words
    table = ReportTable(
        name, [f"h{other}", "n"], [False, True], [Row([Cell(other), Cell("1", value)])], [note]
    )
    check_latex(to_latex(table))
    parsed = html.fragment_fromstring(to_html(table))
    cells = list(parsed.find("tbody")[0])
    assert (cells[0].text or "").split() == other.split()
    assert float(cells[1].get("data-value")) == value
    frame = pd.read_csv(io.StringIO(to_csv(table)), keep_default_na=False, dtype=str)
    assert frame.iloc[0, 0] == other
    assert float(frame.iloc[0, 1]) == value
    lines = to_markdown(table).splitlines()
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines[:3]}) == 1


def lines_of(tables, width) -> list[str]:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(*tables)
    return console.file.getvalue().splitlines()


def test_the_terminal_shows_one_table_for_each_group_with_the_notes_last():
    lines = lines_of(to_terminal(TABLE, 100), 100)
    assert [line.strip() for line in lines if line[:2] in ("no", "OR")] == ["no OR", "OR 0.5_%"]
    assert sum("Bold: best" in line for line in lines) == 1
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("width", [30, 60, 100])
def test_columns_that_do_not_fit_are_counted(width):
    columns = [f"measure {number}" for number in range(9)]
    table = ReportTable("t", columns, [True] * 9, [Row([Cell("12.34", 12.34)] * 9)])
    lines = lines_of(to_terminal(table, width, "report.md"), width)
    shown = sum(f"{number}" in lines[2] for number in range(9))
    assert shown >= 4 or width < 60
    assert max(map(len, lines)) <= width
    if width < 100:
        assert any(re.search(r"\d more columns", line) for line in lines)


def test_quality_stays_in_a_narrow_terminal_and_sizes_go():
    columns = ["run", "linear bits", "nominal bits", "model bits", "checkpoint, MB", "a perplexity"]
    row = Row([Cell("one"), *(Cell("12.34", 12.34) for _ in columns[1:])])
    table = ReportTable("t", columns, [False] + [True] * 5, [row])
    text = " ".join(lines_of(to_terminal(table, 50, "f"), 50))
    assert "perplexity" in text
    assert "checkpoint" not in text
    assert "1 more column in f" in text
    text = " ".join(lines_of(to_terminal(table, 44, "f"), 44))
    assert "perplexity" in text
    assert "model" not in text
    assert "2 more columns in f" in text


def test_a_verdict_stays_in_a_narrow_terminal():
    columns = ["", "A", "B", "B - A", "95 % interval", "n", "verdict"]
    numeric = [False, True, True, True, False, True, False]
    texts = ["KL", "0.056 ± 0.002", "0.061 ± 0.003", "+0.005", "+0.003 to +0.007", "3"]
    row = Row([*map(Cell, texts), Cell("not distinguishable")])
    lines = lines_of(to_terminal(ReportTable("t", columns, numeric, [row]), 60, "f"), 60)
    text = " ".join(lines)
    assert "distinguishable" in text
    assert "+0.003" in text
    assert "0.061" not in text
    assert max(map(len, lines)) <= 60


def test_words_leave_place_for_numbers_in_a_narrow_terminal():
    columns = ["model", "codebook", "precision", "reservation", "linear bits", "a perplexity"]
    words = ["stories260K", "kmeans", "outlier_order 2.5", "outlier_order 0.005"]
    rows = [
        Row([*map(Cell, words), Cell(bits, float(bits)), Cell("14.30", 14.3)])
        for bits in ("2.50", "3.50")
    ]
    table = ReportTable("t", columns, [False] * 4 + [True] * 2, rows)
    text = " ".join(lines_of(to_terminal(table, 60, "f"), 60))
    assert all(number in text for number in ("2.50", "3.50", "14.30"))
    assert "outlier_order" in text
    assert "more column" not in text


def test_words_that_all_rows_share_go_below_and_the_original_is_still_told():
    rows = [
        Row([Cell("m"), Cell("original"), Cell(""), Cell("16", 16)], original=True),
        Row([Cell("m"), Cell("kmeans"), Cell("a"), Cell("2", 2)]),
        Row([Cell("m"), Cell("kmeans"), Cell("b"), Cell("3", 3)]),
    ]
    columns = ["model", "codebook", "precision", "bits"]
    table = slim(ReportTable("t", columns, [False] * 3 + [True], rows))
    assert table.columns == ["precision", "bits"]
    assert [row.cells[0].text for row in table.rows] == ["original", "a", "b"]
    assert table.footnotes == ["In all rows: model m, codebook kmeans."]
    alone = slim(ReportTable("t", columns, [False] * 3 + [True], rows[:2]), without=("precision",))
    assert alone.columns == ["model", "codebook", "bits"]
