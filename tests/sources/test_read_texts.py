"""What was not read of a text is in the results; conversations become the model's own tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import byte_tokenizer, tiny_llama

from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.errors import ConfigError, SourceError
from claq_exp.models.chat import chat_writer
from claq_exp.run.inputs import fetch, tokenize_inputs

TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endfor %}"
)
TURNS = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "a dog."}]
SAID = "26 Jul 2024[user]a cat?[assistant]a dog."


@pytest.mark.case(124, 127)
def test_skipped_records_and_damaged_characters_are_in_results_events_and_notes(
    tiny_run, text_file, tmp_path, capfd
):
    words = text_file.read_text(encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": [words, None]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 " + words.encode())
    words = [
        f"calibration.path={tmp_path / 'a.parquet'}",
        f"evaluation.corpora.wikipedia.path={tmp_path / 'b.txt'}",
        "experiment=rtn_4bit",
        "threads=1",
    ]
    for _ in range(2):  # the second time the windows are those that were kept
        assert main([*tiny_run, *words, "resume=never"]) == 0
        output = capfd.readouterr().out
        assert "Note: calibration: records whose text is null were skipped: 1" in output
        assert "Note: corpora.wikipedia: characters that are damaged, or control ones: 1" in output
        (folder,) = (tmp_path / "outputs" / "default").iterdir()
        assert json.loads((folder / "results.json").read_text())["texts"] == {
            "calibration": {"records_skipped": 1, "characters_damaged": 0},
            "corpora.wikipedia": {"records_skipped": 0, "characters_damaged": 1},
        }
        lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
        told = [(event["text"], *list(event.values())[3:]) for event in lines if "text" in event]
        assert sorted(told) == [("calibration", 1, 0), ("corpora.wikipedia", 0, 1)]
    again = ["evaluate", *tiny_run, *words, f"checkpoint={folder / 'checkpoint'}"]
    assert main(again) == 0
    assert "Note: corpora.wikipedia: characters that are damaged" in capfd.readouterr().out


@pytest.fixture
def talker(tmp_path) -> Path:
    """A model whose tokenizer has a chat template and begins texts with a token."""
    folder = tmp_path / "talker"
    tiny_llama().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.case(130)
def test_windows_of_conversations_are_the_templates_text(talker, tiny_run, tmp_path):
    rows = [{"turns": TURNS}, {"turns": None}] * 20
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        f"model.source={talker}",
        f"calibration.path={tmp_path / 'a.jsonl'}",
        "calibration.field=turns",
        "calibration.chat=true",
        "calibration.draw=first",
        "calibration.join=|",
    ]
    config = compose_config([*tiny_run, *words])
    fetched = fetch(config)
    tokens = tokenize_inputs(config, fetched.model, fetched.contents)
    text = byte_tokenizer().decode(tokens.calibration.flatten())
    assert text == "|".join([SAID] * 20)[: 8 * 64]
    assert tokens.losses.skipped == 20


@pytest.mark.case(130)
def test_a_conversation_that_cannot_be_written_is_one_line():
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match=r"calibration\.chat=true: the model's tokenizer has no"):
        chat_writer(tokenizer, "calibration")
    tokenizer.chat_template = TEMPLATE
    write = chat_writer(tokenizer, "calibration")
    assert write(TURNS) == SAID
    with pytest.raises(SourceError, match=r"roles user, tool: no tools here$"):
        write([TURNS[0], {"role": "tool", "content": "x"}])
