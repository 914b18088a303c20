"""`claq-exp report`: what a person may write behind it, and what is shown."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from claq_exp.errors import ClaqError, ConfigError
from claq_exp.reporting.compare import compare_folders, comparison_markdown
from claq_exp.reporting.report import Report, TableOptions, make_report
from claq_exp.reporting.runs_table import SORT
from claq_exp.reporting.terminal import slim, to_terminal
from claq_exp.reporting.wandb_table import log_report
from claq_exp.system.files import write_bytes
from claq_exp.tracking.limits import check_project

COMPARISON = "compare.md"
WIDER = "a wider terminal"
EXAMPLE = "claq-exp report outputs/default --by seed"


def report_command(arguments: list[str]) -> int:
    """Run `claq-exp report` and return its exit code.  Raises ConfigError for wrong words."""
    asked = _parser().parse_args(arguments)
    if asked.project:
        check_project("report: --project", asked.project)
    if (asked.project or asked.online) and not (asked.wandb or asked.replay):
        raise ConfigError("report: --project and --online are for --wandb and --replay; add one")
    if asked.compare:
        return _compare(asked)
    if asked.replay:
        return _replay(asked)
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
    report = make_report(folders, into, options)
    _show(report)
    if asked.wandb:
        _say(log_report(report, into, project=asked.project, mode=_mode(asked)))
    return 0


def _compare(asked: argparse.Namespace) -> int:
    if asked.folders:
        raise ConfigError(
            f"report: --compare takes two folders, and nothing else; leave out '{asked.folders[0]}'"
        )
    first, second = (Path(folder).expanduser() for folder in asked.compare)
    tables = compare_folders(first, second, seeds=asked.seeds)
    console = Console()
    for name, folder in (("A", first), ("B", second)):
        _say(f"{name}: {folder}")
    rest = COMPARISON if asked.into else WIDER
    for table in tables:
        console.print(table.title, highlight=False, style="bold")
        console.print(*to_terminal(table, console.width, rest))
    if asked.into:
        into = Path(asked.into).expanduser()
        into.mkdir(parents=True, exist_ok=True)
        write_bytes(into / COMPARISON, comparison_markdown(first, second, tables).encode())
        _say(str(into / COMPARISON))
    return 0


def _replay(asked: argparse.Namespace) -> int:
    from claq_exp.reporting.replay import replay

    if asked.folders:
        raise ConfigError(f"report: --replay takes runs, and nothing else; '{asked.folders[0]}'")
    code = 0
    for folder in map(Path, asked.replay):
        try:
            replay(folder.expanduser(), project=asked.project, mode=_mode(asked))
            _say(str(folder / "wandb"))
        except ClaqError as error:
            _say(f"claq-exp: {error}", stderr=True)
            code = max(code, error.exit_code)
    return code


def _say(line: str, *, stderr: bool = False) -> None:
    Console(stderr=stderr).print(line, highlight=False, markup=False, soft_wrap=True)


def _mode(asked: argparse.Namespace) -> str:
    return "online" if asked.online else "offline"


def _show(report: Report) -> None:
    console = Console()
    console.print(
        *to_terminal(slim(report.table, without=("run",)), console.width, report.files[0].name)
    )
    if report.unfinished:
        console.print(report.unfinished.title, highlight=False)
        console.print(*to_terminal(report.unfinished, console.width))
    for line in (*report.notes, *map(str, report.files)):
        _say(line)
    if report.pictures:
        folder, count = report.pictures[0].png.parent, len(report.pictures)
        _say(f"{folder} ({count} pictures, PNG and SVG)")


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
    parser.add_argument("--replay", nargs="+")
    parser.add_argument("--wandb", action="store_true")
    parser.add_argument("--project")
    parser.add_argument("--online", action="store_true")
    return parser


def _words(values: list[str]) -> tuple[str, ...]:
    """Return words that stand apart or between commas."""
    return tuple(word for value in values for word in value.split(",") if word)
