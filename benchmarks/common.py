"""What the benchmarks have in common: miniatures of themselves, and figures for programs.

Every script takes `--quick`, which asks for the smallest sizes and for a tiny random model in the
place of a real one, so that all of it runs in seconds and without a network; its figures mean
nothing.  What is given beside `--quick` counts all the same.  `--figures FILE` appends each line of
the printed table to a file, as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def command_line(about: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts have.  about: the script's docstring."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a miniature; figures mean nothing")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="append figures as JSON lines")
    return parser


def device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu, with TRITON_INTERPRET=1: the way it works, on no GPU; figures mean nothing",
    )


def parse(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Read the command line; `quick` holds other defaults, for `--quick`."""
    if parser.parse_args().quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


@contextmanager
def run_words(asked: argparse.Namespace, *, evaluated: bool = False) -> Iterator[list[str]]:
    """Yield the overrides of a run: those asked for, behind a tiny model's where it is quick.

    evaluated: the run measures a perplexity.
    """
    from tiny_model import tiny_words

    with tempfile.TemporaryDirectory(prefix="claq-quick-") as folder:
        tiny = tiny_words(Path(folder), evaluated=evaluated) if asked.quick else []
        yield [*tiny, *asked.overrides]


def note(asked: argparse.Namespace, **figures: Any) -> None:
    """Append a line to `--figures`.  Raises SystemExit for a number that is not finite."""
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SystemExit(f"{name} is {value}: {figures}")
    if asked.figures is not None:
        with asked.figures.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")
