"""A damaged text is read as far as its kind of file allows, or refused in one line."""

from __future__ import annotations

import gzip
import json

import damaged_texts
import pyarrow
import pyarrow.parquet
import pytest
from damages import started

from claq_exp.errors import SourceError
from claq_exp.sources.text import TextSource, read_documents, read_text

DOCUMENTS = [f"the {number}th cat sees\nthe héron of {number} trees" for number in range(60)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
PLAIN = "\n".join(DOCUMENTS).encode()


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "originals").mkdir()
    (folder / "work").mkdir()
    files = {
        "plain.txt": PLAIN,
        "plain.txt.gz": gzip.compress(PLAIN, mtime=0),
        "rows.jsonl": JSONL,
        "rows.jsonl.gz": gzip.compress(JSONL, mtime=0),
    }
    for name, content in files.items():
        (folder / "originals" / name).write_bytes(content)
    table = pyarrow.table({"text": DOCUMENTS})
    pyarrow.parquet.write_table(table, folder / "originals" / "rows.parquet")
    with pyarrow.ipc.new_file(folder / "originals" / "rows.arrow", table.schema) as file:
        file.write_table(table)
    return started(damaged_texts.__file__, folder / "originals", folder / "work", 12)


@pytest.mark.case(60, 62)
@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".arrow"])
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, cases):
    own = [case for case in cases if case["file"].partition(".")[2] == kind[1:]]
    assert len(own) == 7 * 12
    assert [case for case in own if case["outcome"] not in ("read", "refused")] == []
    assert kind == ".txt" or any(case["outcome"] == "refused" for case in own)


@pytest.mark.case(60)
def test_zero_bytes_and_a_line_without_end_are_text(tmp_path):
    path = tmp_path / "odd.txt"
    path.write_bytes(b"a\0b\r\n" + b"word " * (20 << 20))  # 100 MiB in one line
    text = read_text(TextSource(path=str(path)))
    assert text.startswith("a\0b\nword word")
    assert len(text) == 4 + (100 << 20)


@pytest.mark.case(61)
def test_a_wrong_split_of_a_data_set_is_one_line_that_says_what_there_is(monkeypatch):
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Unknown split \"tset\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SourceError, match=r"some/set.*tset.*'train', 'test'"):
        read_documents(TextSource("some/set", split="tset"))
