"""What a file holds decides how it is read; what is no text is refused by what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save

from claq_exp.errors import ConfigError, SourceError
from claq_exp.sources.content import Losses, kind_of, suffix_of
from claq_exp.sources.text import TextSource, read_documents, read_text

TEXT = "the small cat\nsees the héron — twice\n" * 40
DOCUMENTS = ["the cat", "a\nbig dog", 'says "so" \\ then']
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)


def by_arrow(codec: str, content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKINGS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
    "zstandard": lambda content: by_arrow("zstd", content),
    "lz4": lambda content: by_arrow("lz4", content),
}


def parquet(**columns: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def arrow(*, stream: bool) -> bytes:
    table, sink = pyarrow.table({"text": DOCUMENTS}), pyarrow.BufferOutputStream()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def refused(tmp_path):
    """Return the one line about a file of that name and content."""

    def read(name: str, content: bytes, **options: object) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError) as caught:
            read_text(TextSource(path=str(tmp_path / name), **options))
        line = str(caught.value)
        assert "\n" not in line and str(tmp_path / name) in line
        return line

    return read


@pytest.mark.case(121, 126)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "text"])
def test_a_packed_text_is_the_text_inside_whatever_its_name(packing, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(PACKINGS[packing](TEXT.encode()))
    assert read_text(TextSource(path=str(path))) == TEXT


@pytest.mark.case(121)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_text_that_is_cut_short_is_refused(packing, refused):
    content = PACKINGS[packing](numpy.random.default_rng(0).bytes(9999).hex().encode())
    line = refused("text.txt", content[: len(content) // 2])
    assert f"is no whole {packing.replace('lzma', 'xz')} file" in line


@pytest.mark.case(121)
def test_a_file_packed_twice_is_refused(refused):
    assert "gzip inside of another" in refused("a.txt.gz", gzip.compress(gzip.compress(b"a b")))


@pytest.mark.case(126)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ROWS.PARQUET", parquet(text=DOCUMENTS)),
        ("rows.json", parquet(text=DOCUMENTS)),
        ("rows.parquet.gz", gzip.compress(parquet(text=DOCUMENTS))),
        ("rows.txt", arrow(stream=False)),
        ("rows.feather", arrow(stream=True)),
        ("ROWS.JSONL", JSONL.encode()),
        ("rows.ndjson.zst", by_arrow("zstd", JSONL.encode())),
        ("blob", JSONL.encode()),
        ("rows.csv", b'n,text\n1,the cat\n2,"a\nbig dog"\n3,"says ""so"" \\ then"\n'),
        ("rows.TSV", b'n\ttext\n1\tthe cat\n2\t"a\nbig dog"\n3\t"says ""so"" \\ then"\n'),
        ("mark.jsonl", JSONL.encode("utf-16")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_content_tells_the_kind_and_the_name_where_it_cannot(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(TextSource(path=str(tmp_path / name)))) == DOCUMENTS


def test_json_in_a_file_that_is_named_plain_is_plain_text(tmp_path):
    (tmp_path / "code.txt").write_text(JSONL, encoding="utf-8")
    assert kind_of(tmp_path / "code.txt") == ".txt"
    assert read_text(TextSource(path=str(tmp_path / "code.txt"))) == JSONL


def test_a_suffix_is_that_below_the_packing():
    names = ("c4-train.00000-of-01024.json.gz", "A.JSONL.ZST", "x.gz", "x", "a.tar.xz", "t.feather")
    assert [suffix_of(name) for name in names] == [".json", ".jsonl", "", "", ".tar", ".arrow"]


@pytest.mark.case(122)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_names_the_encoding(encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.replace("\n", "\r\n").encode(encoding))
    for asked in (None, "cp1252"):  # what is asked for is for files without a mark
        losses = Losses()
        text = TextSource(path=str(tmp_path / "a.txt"), encoding=asked)
        assert "".join(read_documents(text, losses)) == TEXT
        assert losses == Losses()


@pytest.mark.case(122)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_its_mark_is_told_and_read_as_it_is_named(encoding, name, refused, tmp_path):
    content = {"a.txt": TEXT, "a.jsonl": JSONL, "a.csv": "text\nthe cat\n"}[name].encode(encoding)
    assert f"set encoding={encoding}" in refused(name, content)
    assert "cat" in read_text(TextSource(path=str(tmp_path / name), encoding=encoding))


@pytest.mark.case(122)
def test_another_encoding_is_told_and_read_as_it_is_named(refused, tmp_path):
    content = "l'élève a été étonné\n".encode("cp1252") * 50
    line = refused("a.txt", content)
    assert "of its characters are no text in UTF-8; set its encoding" in line
    text = read_text(TextSource(path=str(tmp_path / "a.txt"), encoding="cp1252"))
    assert text == "l'élève a été étonné\n" * 50
    for wrong in ("klingon", "hex", "a\0b"):
        with pytest.raises(ConfigError, match="is not known; give"):
            TextSource(path="a", encoding=wrong)


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return content.getvalue()


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(TEXT.encode())
        archive.addfile(member, io.BytesIO(TEXT.encode()))
    return content.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table texts (text)")
    return connection.serialize()


def array() -> bytes:
    content = io.BytesIO()
    numpy.save(content, numpy.arange(5000))
    return content.getvalue()


DICE = numpy.random.default_rng(0)
OTHERS = {
    "a zip archive": zipped(),
    "a tar archive": tarred(),
    "a PDF": b"%PDF-1.7\n" + DICE.bytes(999),
    "a pickle": pickle.dumps(DOCUMENTS),
    "a safetensors file": save({"a": numpy.zeros(99)}),
    "a GGUF": b"GGUF\3\0\0\0" + DICE.bytes(999),
    "an SQLite database": database(),
    "a NumPy array": array(),
    "an image": b"\x89PNG\r\n\x1a\n" + DICE.bytes(999),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"\n<!DOCTYPE HTML>\n<html><body>Access denied</body></html>",
    "a binary file": DICE.bytes(9999),
}


@pytest.mark.case(123)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_text_is_refused_by_what_it_is(what, packed, refused):
    line = refused("text.txt", gzip.compress(OTHERS[what]) if packed else OTHERS[what])
    assert f"is {what}" in line
    assert line.count("; ") >= 1  # what to do


@pytest.mark.case(123)
def test_16_bit_token_ids_are_no_text(refused):
    content = DICE.integers(0, 32000, 5000).astype(numpy.uint16).tobytes()
    assert "tokens.bin is a binary file" in refused("tokens.bin", content)


def test_the_source_of_a_web_page_is_read_where_its_name_says_so(tmp_path):
    (tmp_path / "page.HTML").write_bytes(OTHERS["a web page"])
    assert "Access denied" in read_text(TextSource(path=str(tmp_path / "page.HTML")))


@pytest.mark.case(124)
def test_damaged_and_control_characters_are_counted(tmp_path):
    path = tmp_path / "a.txt"
    whole = "the cat sees a � sign\n" * 200  # which stood there before: no damage
    path.write_bytes(whole.encode() + b"caf\xe9 and\0 tea\x1b\t\x07")
    losses = Losses()
    assert "".join(read_documents(TextSource(path=str(path)), losses)) == (
        f"{whole}caf� and\0 tea\x1b\t\x07"
    )
    assert losses == Losses(damaged=3)
    path = path.with_suffix(".jsonl")
    path.write_bytes(JSONL.encode() * 99 + b'{"text": "caf\xe9"}\n')
    losses = Losses()
    assert read_documents(TextSource(path=str(path)), losses)[-1] == "caf�"
    assert losses == Losses(damaged=1)


@pytest.mark.case(124)
def test_damage_far_behind_the_beginning_is_seen(refused):
    line = refused("a.txt", b"the cat sees " * 9000 + b"\xff" * 9000)
    assert "7.1% of its characters are no text" in line


@pytest.mark.case(125)
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.parquet", b"", "is empty"),
        ("a.txt", b" \n\t\n" * 99, "holds no text: nothing but white space"),
        ("a.jsonl", b"\n \n", "holds no text: no records"),
        ("a.json", b"[]", "holds no text: no records"),
        ("a.parquet", parquet(text=pyarrow.array([], "string")), "holds no text: no records"),
        ("a.parquet", parquet(text=[None, None]), "field 'text' is null in 2 records"),
        ("a.parquet", parquet(text=["", " "]), "holds no text: nothing but white space"),
    ],
)
def test_a_file_without_text_says_so(name, content, words, refused):
    assert words in refused(name, content)


def test_a_file_that_must_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match=r"a\.txt cannot be read: Permission denied$"):
        read_text(TextSource(path=str(path)))


@pytest.mark.case(124)
@pytest.mark.parametrize("form", ["lines", "array", "object", "strings"])
def test_half_a_character_of_json_is_damaged_and_a_pair_is_one(form, tmp_path):
    texts = ["cat \ud83d.", "cat \U0001f431."]  # dumped as escapes: a half alone, and two of one
    records = texts if form == "strings" else [{"text": text} for text in texts]
    content = {
        "lines": "".join(json.dumps(record) + "\n" for record in records),
        "object": json.dumps(records[0], indent=1),
    }.get(form, json.dumps(records))
    (tmp_path / "a.json").write_text(content, encoding="ascii")
    losses = Losses()
    documents = list(read_documents(TextSource(path=str(tmp_path / "a.json")), losses))
    assert documents == ["cat \ufffd.", "cat \U0001f431."][: len(documents)]
    assert losses == Losses(damaged=1)
