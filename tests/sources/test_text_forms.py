"""A text is the same in every kind of file; what is wrong with a file is said with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from claq_exp.errors import ConfigError, SourceError
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.text import TextSource, read_documents, read_text, text_content, text_file

TEXT = "the small cat\nsees the héron\n"
DOCUMENTS = ["the cat", "a\nbig dog", 'says "so" \\ then']


def jsonl(documents: list[str], field: str = "text", *, ascii_only: bool = True) -> bytes:
    lines = [json.dumps({field: text}, ensure_ascii=ascii_only) for text in documents]
    return "".join(line + "\n" for line in lines).encode()


@pytest.fixture
def source(tmp_path):
    def write(name: str, content: bytes, **options: object) -> TextSource:
        (tmp_path / name).write_bytes(content)
        return TextSource(path=str(tmp_path / name), **options)

    return write


@pytest.mark.case(60)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", TEXT.encode()),
        ("no_suffix", TEXT.encode()),
        ("packed.txt.gz", gzip.compress(TEXT.encode())),
        ("windows.txt", TEXT.replace("\n", "\r\n").encode()),
        ("mark.txt", b"\xef\xbb\xbf" + TEXT.encode()),
        (
            "mark_windows.txt.gz",
            gzip.compress(b"\xef\xbb\xbf" + TEXT.encode().replace(b"\n", b"\r\n")),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_of_a_plain_file_gives_the_same_text(name, content, source):
    assert read_text(source(name, content)) == TEXT


@pytest.mark.case(60)
def test_bytes_that_are_no_utf8_are_replaced_and_the_rest_is_kept(source):
    content = b"tea " * 50 + b"caf\xe9 and tea"
    assert read_text(source("latin.txt", content)) == "tea " * 50 + "caf� and tea"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(DOCUMENTS)),
        ("rows.jsonl.gz", gzip.compress(jsonl(DOCUMENTS))),
        ("c4-validation.00000-of-00008.json.gz", gzip.compress(jsonl(DOCUMENTS))),
        ("windows.jsonl", jsonl(DOCUMENTS).replace(b"\n", b"\r\n")),
        ("blank_lines.jsonl", b"\n" + jsonl(DOCUMENTS).replace(b"\n", b"\n\n")),
        ("no_last_newline.jsonl", jsonl(DOCUMENTS).rstrip(b"\n")),
        ("mark.jsonl", b"\xef\xbb\xbf" + jsonl(DOCUMENTS)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_of_a_jsonl_file_gives_the_joined_documents(name, content, source):
    assert read_text(source(name, content)) == "\n\n".join(DOCUMENTS)


def test_field_and_join_of_a_jsonl_file_are_the_configs(source):
    text = source("rows.jsonl", jsonl(DOCUMENTS, "body"), field="body", join=" | ")
    assert read_text(text) == " | ".join(DOCUMENTS)


@pytest.mark.parametrize("odd", ["\u2028", "\x85"], ids=ascii)
def test_only_a_newline_ends_a_line_of_jsonl(odd, source):
    documents = [f"one{odd}two", "three"]
    assert read_text(source("rows.jsonl", jsonl(documents, ascii_only=False))) == (
        f"one{odd}two\n\nthree"
    )


@pytest.mark.case(62)
@pytest.mark.parametrize(
    "line",
    [b'["a list"]', b'"a string"', b'{"body": "another field"}', b"5"],
    ids=bytes.decode,
)
def test_a_broken_line_of_jsonl_is_named_with_file_and_number(line, source):
    text = source("rows.jsonl", jsonl(DOCUMENTS[:1]) + b"\n" + line + b"\n")
    with pytest.raises(SourceError) as caught:
        read_text(text)
    assert f"{text.path} line 3: no JSON object with field 'text'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.case(62)
def test_a_line_that_is_no_json_is_named_with_file_and_number(source):
    text = source("rows.jsonl", jsonl(DOCUMENTS[:1]) + b'\n{"text": "cut\n')
    with pytest.raises(SourceError) as caught:
        read_text(text)
    assert f"{text.path} line 3: no JSON (" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_gz_file_is_named(source):
    text = source("text.txt.gz", gzip.compress(TEXT.encode() * 99)[:30])
    with pytest.raises(SourceError, match=r"text\.txt\.gz"):
        read_text(text)


def test_a_pinned_content_is_checked(source, tmp_path):
    text = source("plain.txt", TEXT.encode())
    right = sha256_of(tmp_path / "plain.txt")
    assert text_file(TextSource(path=text.path, sha256=right)) == tmp_path / "plain.txt"
    with pytest.raises(SourceError, match=right):
        text_file(TextSource(path=text.path, sha256="0" * 64))


def test_the_pin_of_a_source_does_not_bind_a_file_that_takes_its_place(source):
    text = source("plain.txt", TEXT.encode(), source="wheel://a==1/b.txt", sha256="0" * 64)
    assert read_text(text) == TEXT


@pytest.mark.case(61)
def test_a_missing_file_is_told_from_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("nothing.txt", "./nothing", "/nothing/at/all", "~/nothing"):
        with pytest.raises(ConfigError, match=r"does not exist \(looked in "):
            text_file(TextSource(path=path))
    assert text_file(TextSource("owner/data_set")) is None


def test_a_file_given_as_a_source_is_pointed_to_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").write_text(TEXT, encoding="utf-8")
    for source in ("words", "./nothing", "/nothing/at/all", "~/nothing"):
        with pytest.raises(ConfigError, match="give a file as path"):
            text_file(TextSource(source))


def test_a_text_from_nowhere_is_refused():
    for path in (None, ""):
        with pytest.raises(ConfigError, match="a text needs a path"):
            TextSource(path=path)


def test_a_data_set_that_the_hub_does_not_give_is_one_line(monkeypatch):
    import datasets

    def fail(*args, **options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        SourceError, match=r"'owner/data_set'.*no route.*; or give a local file as path"
    ) as caught:
        read_text(TextSource("owner/data_set", subset="en"))
    assert "\n" not in str(caught.value)


@pytest.mark.case(61)
def test_documents_of_a_data_set_are_joined_and_a_wrong_field_names_the_others(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"body": DOCUMENTS})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    assert read_text(TextSource("some/set", field="body")) == "\n\n".join(DOCUMENTS)
    with pytest.raises(ConfigError, match=r"no field 'text'; it has: body \(string\)"):
        read_text(TextSource("some/set"))


LINES = " \n = Title = \n\n A sentence . \n  padded\tlast  "


@pytest.mark.parametrize("end", ["", "\n"], ids=["open end", "closed end"])
def test_lines_of_a_plain_file_become_the_rows_that_the_hub_has_of_it(end, source):
    whole = source("a.txt", (LINES + end).encode())
    assert read_documents(whole) == [LINES + end]
    rows = source("b.txt", (LINES + end).encode(), lines="rows")
    assert read_documents(rows) == [
        "",
        " = Title = \n",
        "",
        " A sentence . \n",
        "  padded\tlast  \n",
    ]
    stripped = source("c.txt", (LINES + end).encode(), lines="stripped")
    assert read_documents(stripped) == ["", "= Title =", "", "A sentence .", "padded\tlast"]


def test_only_the_first_documents_are_joined_where_fewer_are_asked_for(source):
    assert read_text(source("a.jsonl", jsonl(DOCUMENTS), documents=2, join="+")) == (
        "the cat+a\nbig dog"
    )
    assert read_text(source("b.jsonl", jsonl(DOCUMENTS), documents=99, join="+")) == (
        "+".join(DOCUMENTS)
    )


@pytest.mark.case(61)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_give_their_field_and_name_the_others(kind, tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"body": DOCUMENTS, "number": [1, 2, 3]})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        rows.to_parquet(path)
    else:
        rows.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    assert list(read_documents(TextSource(path=str(path), field="body"))) == DOCUMENTS
    with pytest.raises(ConfigError, match=r"no field 'text'; it has: body \(string\), number"):
        read_documents(TextSource(path=str(path)))
    with pytest.raises(ConfigError, match="field 'number' is no text but int64"):
        read_documents(TextSource(path=str(path), field="number"))
    path.write_bytes(b"no table")
    with pytest.raises(SourceError, match=f"rows.{kind} cannot be read as a table"):
        read_documents(TextSource(path=str(path), field="body"))


def test_a_split_is_asked_of_the_library_datasets(monkeypatch):
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": DOCUMENTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents(TextSource("some/set", subset="raw", revision="abc"))[:] == DOCUMENTS
    assert asked == [(("some/set", "raw"), {"split": "train", "revision": "abc"})]


def test_files_of_a_data_set_exclude_a_subset_and_have_a_known_kind():
    with pytest.raises(ConfigError, match=r"'a/b' is asked for files 'c\.json' and for subset 'd'"):
        TextSource("a/b", files="c.json", subset="d")
    with pytest.raises(ConfigError, match=r"kind of files 'x\.pdf\.gz' '\.pdf' is not known.*json"):
        read_documents(TextSource("a/b", files="x.pdf.gz"))


def test_the_content_of_a_data_set_is_that_of_its_documents(monkeypatch):
    import datasets

    def content(texts: list[str], **options: object) -> str:
        rows = datasets.Dataset.from_dict({"text": texts})
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
        return text_content(TextSource("some/set", **options))

    whole = content(DOCUMENTS)
    assert content(list(DOCUMENTS)) == whole
    assert content(DOCUMENTS[:2]) != whole
    assert content(["the ca", "ta\nbig dog", DOCUMENTS[2]]) != whole
    assert content([*DOCUMENTS, "more"], documents=3) == whole


def test_several_files_of_a_data_set_are_one_text(tmp_path, monkeypatch):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_bytes(jsonl(DOCUMENTS))
    files[1].write_bytes(jsonl(["more"]))
    text = TextSource("some/set", files="*.jsonl")

    def content(*given: Path) -> str:
        monkeypatch.setattr("claq_exp.sources.text.data_set_files", lambda *_: list(given))
        return text_content(text)

    assert content(files[0]) == sha256_of(files[0])
    assert len({content(*files), content(files[1], files[0]), content(files[0])}) == 3
    content(*files)
    assert read_documents(text) == [*DOCUMENTS, "more"]
    assert read_documents(TextSource("some/set", files="*.jsonl", documents=2)) == DOCUMENTS[:2]
