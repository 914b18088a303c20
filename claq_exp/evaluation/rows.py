"""Rows of a task out of a local file, read afresh: a shared cache can serve stale rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claq_exp.errors import SourceError, telling_line
from claq_exp.sources.content import (
    JSON,
    Losses,
    kind_of,
    read_plain,
    suffix_of,
)
from claq_exp.sources.records import json_records
from claq_exp.sources.tables import TABLES, read_table

if TYPE_CHECKING:
    import datasets

ARTICLES = ".raw"  # plain text with articles of WikiText
KINDS = (*JSON, *TABLES, ARTICLES)  # suffixes of files with rows, also packed
TITLE = re.compile(r"= (?!=).*(?<!=) =")


def read_rows(path: Path, columns: Mapping[str, str]) -> datasets.Dataset:
    """Return the rows of a file, in memory.

    columns: field of the rows -> field of the file, where they differ; truth values in them become
    1 and 0.  Raises SourceError for content that is no table of rows with these fields.
    """
    losses = Losses()
    try:
        rows = _rows(path, losses)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {telling_line(error)}") from error
    if losses.damaged:
        raise SourceError(f"{path} has {losses.damaged:,} characters that are no UTF-8 text")
    if not len(rows):
        raise SourceError(f"{path} holds no rows")
    for field, source in columns.items():
        rows = _renamed(rows, field, source, path)
    return rows


def _rows(path: Path, losses: Losses) -> datasets.Dataset:
    import datasets

    kind = kind_of(path)
    if kind in TABLES:
        return datasets.Dataset(datasets.table.InMemoryTable(read_table(path, kind, None, losses)))
    if kind in JSON:
        return datasets.Dataset.from_list(_json_rows(path, losses))
    if suffix_of(path.name) != ARTICLES:
        raise SourceError(f"{path} is plain text; rows need one of {', '.join(KINDS)}")
    return datasets.Dataset.from_dict({"page": wikitext_articles(read_plain(path, None, losses))})


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


def _json_rows(path: Path, losses: Losses) -> list[dict[str, Any]]:
    """Read an array of objects, or one object a line; all must have the same fields."""
    rows: list[dict[str, Any]] = []
    for place, row in json_records(path, None, losses):
        if not isinstance(row, dict):
            raise SourceError(f"{path} {place}: no JSON object")
        if rows and row.keys() != rows[0].keys():
            odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise SourceError(f"{path} {place} and the first one differ in their fields: {odd}")
        rows.append(row)
    return rows
