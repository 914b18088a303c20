"""Rows of a task out of a local file, read afresh: a shared cache can serve stale rows."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claq_exp.errors import SourceError, first_line
from claq_exp.sources.tables import TABLES

if TYPE_CHECKING:
    import datasets

TITLE = re.compile(r"= (?!=).*(?<!=) =")


def file_kind(name: str) -> str | None:
    """Return the suffix that says how a file is read, or None where it is of no known kind."""
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in READERS else None


def read_rows(path: Path, columns: Mapping[str, str]) -> datasets.Dataset:
    """Return the rows of a file, in memory.

    columns: field of the rows -> field of the file, where they differ; truth values in them become
    1 and 0.  Raises SourceError for content that is no table of rows with these fields.
    """
    kind = file_kind(path.name)
    assert kind is not None
    try:
        content = path.read_bytes()
        rows = READERS[kind](gzip.decompress(content) if path.suffix == ".gz" else content)
    except SourceError as error:
        raise SourceError(f"{path} {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is no whole gzip file: {error}") from error
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {first_line(error)}") from error
    if not len(rows):
        raise SourceError(f"{path} holds no rows")
    for field, source in columns.items():
        rows = _renamed(rows, field, source, path)
    return rows


def wikitext_articles(text: str) -> list[str]:
    """Split a WikiText file at its top-level headings, ` = Title = `.

    The rule of the hub's EleutherAI/wikitext_document_level: an article begins with its heading;
    what stands before the first one is left out where it is blank.
    """
    articles: list[list[str]] = [[]]
    for line in text.split("\n"):
        if TITLE.fullmatch(line.strip()):
            articles.append([])
        articles[-1].append(line)
    return [text for lines in articles if (text := "\n".join(lines)).strip()]


def _renamed(rows: datasets.Dataset, field: str, source: str, path: Path) -> datasets.Dataset:
    import datasets

    if source not in rows.column_names:
        raise SourceError(f"{path} has no field '{source}'; it has: {', '.join(rows.column_names)}")
    if field in rows.column_names:
        rows = rows.remove_columns(field)
    rows = rows.rename_column(source, field)
    if rows.features[field].dtype == "bool":
        rows = rows.cast_column(field, datasets.Value("int64"))
    return rows


def _json_rows(content: bytes) -> datasets.Dataset:
    """Read an array of objects, or one object a line; all must have the same fields."""
    import datasets

    text = content.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        numbered = list(enumerate(json.loads(text), start=1))
    else:
        numbered = [
            (number, _object(line, number))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    for number, row in numbered:
        if not isinstance(row, dict):
            raise SourceError(f"row {number}: no JSON object")
        if row.keys() != numbered[0][1].keys():
            odd = ", ".join(sorted(row.keys() ^ numbered[0][1].keys()))
            raise SourceError(f"row {number} and the first one differ in their fields: {odd}")
    return datasets.Dataset.from_list([row for _, row in numbered])


def _object(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise SourceError(f"line {number}: no JSON object ({error})") from error


def _article_rows(content: bytes) -> datasets.Dataset:
    import datasets

    text = content.decode("utf-8-sig").replace("\r\n", "\n")
    return datasets.Dataset.from_dict({"page": wikitext_articles(text)})


READERS: dict[str, Callable[[bytes], datasets.Dataset]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    **TABLES,
    ".raw": _article_rows,
}
