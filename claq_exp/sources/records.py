"""Records of JSON: an array, a value a line, or one object over several lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from claq_exp.errors import SourceError
from claq_exp.sources.content import Losses, read_lines


def json_records(path: Path, encoding: str | None, losses: Losses) -> Iterator[tuple[str, Any]]:
    """Give each record of a file with its place, `line 3` or `record 3`.

    encoding, losses: as in `read_plain`.  Raises SourceError that names file and place of what is
    no JSON.
    """
    with read_lines(path, encoding, losses) as lines:
        numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        for first, line in numbered:
            if (records := _whole(path, line, lines)) is not None:
                yield from records
                return
            yield f"line {first}", _parsed(line, f"{path} line {first}")
            break
        for number, line in numbered:
            yield f"line {number}", _parsed(line, f"{path} line {number}")


def _whole(path: Path, line: str, rest: Iterator[str]) -> list[tuple[str, Any]] | None:
    """Return the records of a file that is one value; None where `line` is a record of its own."""
    if line.lstrip().startswith("["):
        values = _parsed("".join([line, *rest]), str(path))
        return [(f"record {number}", value) for number, value in enumerate(values, start=1)]
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        with contextlib.suppress(ValueError, RecursionError):
            return [("record 1", json.loads("".join([line, *rest])))]
    return None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: no JSON ({error})") from error
