"""What other quantizers get of this project: the model's folder and a run's token windows."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_words

import claq_exp

FOLDER = Path(__file__).parents[2] / "examples" / "peers"
PEERS = sorted(FOLDER.glob("with_*.py"))


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


@pytest.mark.parametrize(
    ("script", "package", "command"),
    [
        ("with_auto_round", "auto_round", "pip install auto-round"),
        ("with_hqq", "hqq", "pip install hqq"),
        ("with_llm_compressor", "llmcompressor", "pip install --no-deps llmcompressor"),
        ("with_llama_cpp", "llama_cpp_py_sync", "pip install --no-deps llama-cpp-py-sync"),
    ],
)
def test_a_script_without_its_package_says_in_one_line_how_to_install_it(
    script, package, command, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.syspath_prepend(str(FOLDER))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'{package}' is not installed: {command}" in line
