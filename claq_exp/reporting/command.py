"""`claq-exp report`: what a person may write behind it, and what is shown."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from claq_exp.checkpoint.files import write_bytes
from claq_exp.errors import ConfigError
from claq_exp.reporting.compare import compare_runs, comparison_markdown
from claq_exp.reporting.report import Report, TableOptions, make_report
from claq_exp.reporting.runs_table import SORT
from claq_exp.reporting.terminal import slim, to_terminal

COMPARISON = "compare.md"
EXAMPLE = "claq-exp report outputs/default --by seed"


def report_command(arguments: list[str]) -> int:
    """Run `claq-exp report` and return its exit code.  Raises ConfigError for wrong words."""
    asked = _parser().parse_args(arguments)
    if asked.compare:
        return _compare(asked)
    if not asked.folders:
        raise ConfigError(f"report needs a folder, e.g. {EXAMPLE}")
    folders = [Path(folder).expanduser() for folder in asked.folders]
    into = Path(asked.into).expanduser() if asked.into else folders[0]
    options = TableOptions(
        by=_words(asked.by),
        rows=_words(asked.rows),
        columns=_words(asked.columns),
        metrics=_words(asked.metrics),
        sort=asked.sort,
        seeds=asked.seeds,
    )
    if options.by and (options.rows or options.columns):
        raise ConfigError("report: --by is for the table of runs; add its keys to --rows")
    _show(make_report(folders, into, options))
    return 0


def _compare(asked: argparse.Namespace) -> int:
    if asked.folders:
        raise ConfigError(
            f"report: --compare takes two runs, and nothing else; '{asked.folders[0]}'"
        )
    first, second = (Path(folder).expanduser() for folder in asked.compare)
    grids = compare_runs(first, second)
    console = Console()
    for name, folder in (("A", first), ("B", second)):
        console.print(f"{name}: {folder}", highlight=False, markup=False, soft_wrap=True)
    for grid in grids:
        console.print(grid.title, highlight=False, style="bold")
        console.print(*to_terminal(grid, console.width))
    if asked.into:
        into = Path(asked.into).expanduser()
        into.mkdir(parents=True, exist_ok=True)
        write_bytes(into / COMPARISON, comparison_markdown(first, second, grids).encode())
        console.print(str(into / COMPARISON), highlight=False, markup=False, soft_wrap=True)
    return 0


def _show(report: Report) -> None:
    console = Console()
    console.print(
        *to_terminal(slim(report.grid, without=("run",)), console.width, report.files[0].name)
    )
    if report.unfinished:
        console.print(report.unfinished.title, highlight=False)
        console.print(*to_terminal(report.unfinished, console.width))
    for line in (*report.notes, *map(str, report.files)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"report: {message}; see claq-exp --help")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--by", nargs="+", default=[])
    for name in ("--rows", "--columns", "--metrics"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--sort", default=SORT)
    parser.add_argument("--seeds", action="store_true")
    parser.add_argument("--into")
    parser.add_argument("--compare", nargs=2)
    return parser


def _words(values: list[str]) -> tuple[str, ...]:
    """Return words that stand apart or between commas."""
    return tuple(word for value in values for word in value.split(",") if word)
