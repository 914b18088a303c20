"""Tables in files, wholly in memory: a cache beside the file could serve stale rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from claq_exp.errors import SourceError, telling_line
from claq_exp.sources.content import Losses, read_bytes, read_lines

if TYPE_CHECKING:
    import pyarrow


def read_table(path: Path, kind: str, encoding: str | None, losses: Losses) -> pyarrow.Table:
    """Return the table of a file.

    kind: a suffix of TABLES.  encoding, losses: as in `read_plain`, for tables that are text.
    Raises SourceError for a content that is no such table.
    """
    if kind in SEPARATED:
        with read_lines(path, encoding, losses) as lines:
            content = "".join(lines).encode()
    else:
        content = read_bytes(path)
    try:
        table = TABLES[kind](content)
        table.validate(full=True)  # what pyarrow reads of a damaged file may lead outside of it
    except Exception as error:
        raise SourceError(f"{path} cannot be read as a table: {telling_line(error)}") from error
    return table


def _parquet_table(content: bytes) -> pyarrow.Table:
    import pyarrow
    import pyarrow.parquet

    # pyarrow's threads can abort a process that ends soon after a read (arrow issue 34314)
    alone = {"use_threads": False, "pre_buffer": False}
    return pyarrow.parquet.read_table(pyarrow.BufferReader(content), **alone)


def _arrow_table(content: bytes) -> pyarrow.Table:
    import pyarrow

    stream = pyarrow.ipc.open_file if content.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    return stream(pyarrow.BufferReader(content)).read_all()


def _separated_table(content: bytes, separator: str) -> pyarrow.Table:
    import pyarrow
    import pyarrow.csv

    return pyarrow.csv.read_csv(
        pyarrow.BufferReader(content),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=max(1, len(content))),
        parse_options=pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
    )


SEPARATED = {".csv": ",", ".tsv": "\t"}
# Suffix of a file -> reader of its content.
TABLES: dict[str, Callable[[bytes], pyarrow.Table]] = {
    ".parquet": _parquet_table,
    ".arrow": _arrow_table,
    ".csv": lambda content: _separated_table(content, ","),
    ".tsv": lambda content: _separated_table(content, "\t"),
}
