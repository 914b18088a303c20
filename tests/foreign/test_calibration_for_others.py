"""What other quantizers get of this project: the model's folder and a run's token windows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_words

import claq_exp

PEERS = sorted((Path(__file__).parents[2] / "examples" / "peers").glob("*.py"))


def test_windows_are_those_of_the_text_and_no_evaluation_text_is_asked_for(tiny_model, text_file):
    words = [word for word in tiny_words(tiny_model, text_file) if "evaluation.c" not in word]
    first = [*words, "calibration.draw=first", "evaluation.corpora.wikipedia.path=nowhere.txt"]
    found = claq_exp.calibration_inputs(*first)
    assert found.model == tiny_model
    assert found.windows.dtype == torch.int64
    text = text_file.read_text(encoding="utf-8")
    tokens = byte_tokenizer()(text, return_tensors="pt").input_ids[0][: 8 * 64]
    assert found.windows.equal(tokens.reshape(8, 64))
    seeds = [
        claq_exp.calibration_inputs(*words, settings={"seed": seed}).windows for seed in (0, 0, 1)
    ]
    assert seeds[0].equal(seeds[1])
    assert not seeds[0].equal(seeds[2])


@pytest.mark.parametrize("script", PEERS, ids=lambda path: path.name)
def test_scripts_say_what_to_install_and_take_the_windows(script):
    text = script.read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(text))
    assert "pip install" in about
    assert f"python examples/peers/{script.name}" in about
    assert "claq_exp.calibration_inputs(" in text
