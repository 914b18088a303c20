"""The text of a table or of JSON is one field: nulls are counted, other types are listed."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from claq_exp.errors import ClaqError, ConfigError
from claq_exp.sources.content import Losses
from claq_exp.sources.text import TextSource, read_documents, text_content

DOCUMENTS = ["the cat", "a\nbig dog", 'says "so" \\ then']
CHAT = [
    [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "a dog."}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "so?"}],
]
SHARED = [
    [{"from": "human", "value": "a cat?"}, {"from": "gpt", "value": "a dog."}],
    [{"from": "system", "value": "be brief"}, {"from": "human", "value": "so?"}],
]


@pytest.fixture(params=["parquet", "jsonl", "json", "hub"])
def stored(request, tmp_path, monkeypatch):
    """Return a text whose records are stored as a table, as JSON or on the hub."""

    def store(rows: list[dict], **options: object) -> TextSource:
        path = tmp_path / f"rows.{request.param}"
        if request.param == "hub":
            table = datasets.Dataset.from_list(rows)
            monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
            return TextSource("some/set", **options)
        if request.param == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif request.param == "json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return TextSource(path=str(path), **options)

    return store


def line_of(text: TextSource) -> str:
    with pytest.raises(ClaqError) as caught:
        read_documents(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.case(127)
def test_records_that_are_null_are_skipped_and_counted(stored):
    losses = Losses()
    rows = [{"text": text} for text in (DOCUMENTS[0], None, *DOCUMENTS[1:], None)]
    text = stored(rows)
    assert list(read_documents(text, losses)) == DOCUMENTS
    assert losses == Losses(skipped=2)
    assert read_documents(text)[1] == DOCUMENTS[1]  # the first one that is there
    assert read_documents(TextSource(**{**vars(text), "documents": 2})) == DOCUMENTS[:2]


@pytest.mark.case(129)
@pytest.mark.parametrize(
    ("value", "kind"),
    [(["a", "b"], "list of string"), ({"en": "a", "de": "b"}, "{en, de}"), (3, "int64|number")],
    ids=["list", "struct", "integer"],
)
def test_a_field_that_is_no_text_is_one_line_with_all_fields(value, kind, stored):
    line = line_of(stored([{"text": value, "title": "one"}] * 2))
    kinds = [word for word in kind.split("|") if f"is no text but {word};" in line]
    assert len(kinds) == 1
    assert f"there are: text ({kinds[0]}), title (string); set field, e.g. field=title" in line


@pytest.mark.case(129)
def test_a_field_that_is_missing_is_one_line_with_all_fields(stored):
    line = line_of(stored([{"body": "a cat", "id": 3}]))
    assert "field 'text'; it has: body (string), id (" in line
    assert line.endswith("; set field, e.g. field=body")


@pytest.mark.case(129)
def test_very_many_fields_are_not_all_listed(stored):
    line = line_of(stored([{f"field_{number}": "a" for number in range(40)}]))
    assert "field_11 (string), 28 more" in line and "field_12" not in line


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array(DOCUMENTS, pyarrow.large_string()),
        pyarrow.array(DOCUMENTS).dictionary_encode(),
        pyarrow.array([text.encode() for text in DOCUMENTS]),
    ],
    ids=["large", "dictionary", "bytes"],
)
def test_every_type_of_strings_is_text(values, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    assert list(read_documents(TextSource(path=str(tmp_path / "a.parquet")))) == DOCUMENTS


@pytest.mark.case(129)
def test_bytes_that_are_no_utf8_are_no_text(tmp_path):
    table = pyarrow.table({"text": [b"\xff\xfe", b"a"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "is no text but binary" in line_of(TextSource(path=str(tmp_path / "a.parquet")))


@pytest.mark.case(128)
@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": text} for text in DOCUMENTS]),
        json.dumps([{"text": text} for text in DOCUMENTS], indent=2),
        json.dumps(DOCUMENTS),
        "\n\n" + json.dumps(DOCUMENTS, indent=2),
        "".join(json.dumps(text) + "\n" for text in DOCUMENTS),
    ],
    ids=["array", "indented", "strings", "indented strings", "lines of strings"],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_arrays_of_records_and_strings_are_documents(content, name, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_documents(TextSource(path=str(tmp_path / name))) == DOCUMENTS


@pytest.mark.case(128)
def test_one_object_over_several_lines_is_one_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": DOCUMENTS[1]}, indent=1), encoding="utf-8")
    assert read_documents(TextSource(path=str(path))) == [DOCUMENTS[1]]
    path.write_text(json.dumps({"version": 1, "data": [{"text": "a"}]}, indent=1), encoding="utf-8")
    line = line_of(TextSource(path=str(path)))
    assert f"{path} record 1: no JSON object with field 'text'" in line
    assert "version (number), data (list of {text})" in line


@pytest.mark.case(62, 128)
@pytest.mark.parametrize(
    "content", ['[{"text": "a"}, {"text', '[{"text": "a"}] trailing', "[[" * 9999]
)
def test_a_broken_array_is_named(content, tmp_path):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert f"{tmp_path / 'a.json'}: no JSON (" in line_of(TextSource(path=str(tmp_path / "a.json")))


@pytest.mark.case(62)
def test_the_record_of_an_array_that_differs_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"body": "b"}]', encoding="utf-8")
    line = line_of(TextSource(path=str(tmp_path / "a.json")))
    assert "a.json record 2: no JSON object with field 'text'; it has: body (string)" in line


@pytest.mark.case(130)
@pytest.mark.parametrize("rows", [CHAT, SHARED], ids=["messages", "ShareGPT"])
def test_conversations_are_written_where_that_is_asked_for(rows, stored):
    losses = Losses()
    text = stored([{"turns": row} for row in [*rows, None]], field="turns", chat=True)
    documents = read_documents(
        text, losses, lambda messages: "".join(f"<{m['role']}>{m['content']}" for m in messages)
    )
    assert list(documents) == ["<user>a cat?<assistant>a dog.", "<system>be brief<user>so?"]
    assert losses == Losses(skipped=1)
    assert len(text_content(text)) == 64


@pytest.mark.case(130)
@pytest.mark.parametrize("rows", [CHAT, SHARED], ids=["messages", "ShareGPT"])
def test_conversations_that_are_not_asked_for_are_one_line_with_what_to_set(rows, stored):
    stored_rows = [{"turns": row, "id": 3} for row in rows]
    for line in (line_of(stored(stored_rows)), line_of(stored(stored_rows, field="turns"))):
        assert line.endswith("; field=turns chat=true reads its conversations")


@pytest.mark.case(130)
def test_what_is_no_conversation_is_refused(stored, tmp_path):
    assert "is no conversation, which chat=true asks for, but string" in line_of(
        stored([{"text": "a cat"}], chat=True)
    )
    assert "neither {role, content} nor {from, value}" in line_of(
        stored([{"text": [{"speaker": "a", "words": "b"}]}], chat=True)
    )
    (tmp_path / "plain.txt").write_text("a cat", encoding="utf-8")
    with pytest.raises(ConfigError, match="is plain text, and chat=true asks for records"):
        read_documents(TextSource(path=str(tmp_path / "plain.txt"), chat=True))


@pytest.mark.case(132)
def test_shards_of_a_folder_are_one_text(tmp_path):
    for number, document in enumerate(DOCUMENTS):
        folder = tmp_path / "set" / "train"
        folder.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"text": [document, None]})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet")
    losses = Losses()
    text = TextSource(path=str(tmp_path / "set"), files="train/*.parquet")
    assert read_documents(text, losses) == DOCUMENTS
    assert losses == Losses(skipped=3)
    whole = text_content(text)
    Path(tmp_path / "set" / "train" / "2.parquet").unlink()
    assert text_content(text) != whole
    with pytest.raises(ConfigError, match="sha256 pins the content of a file"):
        read_documents(TextSource(path=str(tmp_path / "set"), sha256="0" * 64))


@pytest.mark.case(132)
def test_a_data_set_that_was_saved_to_disk_says_how_it_is_read(tmp_path):
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    line = line_of(TextSource(path=str(tmp_path / "saved")))
    assert f"'{tmp_path / 'saved'}' is a folder, with 3 .json, 1 .arrow; give one file" in line
    assert line.endswith("e.g. files=train/*.arrow")
    text = TextSource(path=str(tmp_path / "saved"), files="train/*.arrow")
    assert list(read_documents(text)) == DOCUMENTS
    line = line_of(TextSource(path=str(tmp_path / "saved"), files="*.txt"))
    assert "has no file that matches files=*.txt, but 3 .json, 1 .arrow" in line


@pytest.mark.case(130)
@pytest.mark.parametrize("message", ["a cat?", 3, None, ["user", "a cat?"]])
def test_a_message_that_is_no_object_is_one_line(message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"turns": [message]}]), encoding="utf-8")
    line = line_of(TextSource(path=str(tmp_path / "a.json"), field="turns", chat=True))
    assert "a.json record 1: a message of a conversation is neither {role, content} nor" in line
