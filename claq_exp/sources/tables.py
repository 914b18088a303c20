"""Tables in files, as data sets in memory: a cache beside the file could serve stale rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets
    import pyarrow


def _parquet_rows(content: bytes) -> datasets.Dataset:
    import pyarrow
    import pyarrow.parquet

    # pyarrow's threads can abort a process that ends soon after a read (arrow issue 34314)
    alone = {"use_threads": False, "pre_buffer": False}
    return _dataset(pyarrow.parquet.read_table(pyarrow.BufferReader(content), **alone))


def _arrow_rows(content: bytes) -> datasets.Dataset:
    import pyarrow

    stream = pyarrow.ipc.open_file if content.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    return _dataset(stream(pyarrow.BufferReader(content)).read_all())


def _dataset(table: pyarrow.Table) -> datasets.Dataset:
    import datasets

    table.validate(full=True)  # what pyarrow reads of a damaged file may lead outside of it
    return datasets.Dataset(datasets.table.InMemoryTable(table))


# Suffix of a file -> reader of its content.
TABLES: dict[str, Callable[[bytes], datasets.Dataset]] = {
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
