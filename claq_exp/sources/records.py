"""Records of JSON: an array, a value a line, or one object over several lines."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from claq_exp.errors import SourceError
from claq_exp.sources.content import Losses, read_lines

ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # of half a character, or of one in two halves
HALF = re.compile("[\ud800-\udfff]")  # one whose other half is missing


def json_records(path: Path, encoding: str | None, losses: Losses) -> Iterator[tuple[str, Any]]:
    """Give each record of a file with its place, `line 3` or `record 3`.

    encoding, losses: as in `read_plain`; half a character that is escaped counts as damaged.
    Raises SourceError that names file and place of what is no JSON.
    """
    with read_lines(path, encoding, losses) as lines:
        numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        for first, line in numbered:
            if (records := _whole(path, line, lines, losses)) is not None:
                yield from records
                return
            yield f"line {first}", _parsed(line, f"{path} line {first}", losses)
            break
        for number, line in numbered:
            yield f"line {number}", _parsed(line, f"{path} line {number}", losses)


def _whole(
    path: Path, line: str, rest: Iterator[str], losses: Losses
) -> list[tuple[str, Any]] | None:
    """Return the records of a file that is one value; None where `line` is a record of its own."""
    if line.lstrip().startswith("["):
        values = _parsed("".join([line, *rest]), str(path), losses)
        return [(f"record {number}", value) for number, value in enumerate(values, start=1)]
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        with contextlib.suppress(ValueError, RecursionError):
            return [("record 1", _loaded("".join([line, *rest]), losses))]
    return None


def _parsed(text: str, where: str, losses: Losses) -> Any:
    try:
        return _loaded(text, losses)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: no JSON ({error})") from error


def _loaded(text: str, losses: Losses) -> Any:
    """Return a value of JSON.  No tokenizer takes half a character: it becomes U+FFFD."""
    value = json.loads(text)
    return _mended(value, losses) if ESCAPE.search(text) else value


def _mended(value: Any, losses: Losses) -> Any:
    if isinstance(value, str):
        whole, damaged = HALF.subn("\ufffd", value)
        losses.damaged += damaged
        return whole
    if isinstance(value, list):
        return [_mended(part, losses) for part in value]
    if isinstance(value, dict):
        return {_mended(key, losses): _mended(part, losses) for key, part in value.items()}
    return value
