"""A GGUF file by its path is a model like any other."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import tiny_llama
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM

from claq_exp.cli import main
from claq_exp.models.source import ModelSource, model_folder
from claq_exp.run_folder import run_state
from claq_exp.sources.cache import cached_folder


@pytest.fixture
def model():
    return tiny_llama(hidden_size=64, intermediate_size=96, vocab_size=257)


@pytest.fixture(params=["TINY 2.GGUF"])
def file(request, model, tmp_path, monkeypatch):
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / request.param, model)
    return tmp_path / request.param


@pytest.mark.case(143)
def test_a_gguf_file_gives_the_model_that_it_holds_and_is_converted_once(file, model):
    said = []
    folder = model_folder(ModelSource(str(file)), say=said.append)
    assert [str(file) in line and "once" in line for line in said] == [True]
    assert model_folder(ModelSource(str(file)), weights=False, say=said.append) == folder
    assert len(said) == 1
    tokens = torch.arange(40).reshape(2, 20)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(
        loaded(tokens).logits, model.float()(tokens).logits, rtol=1e-3, atol=1e-3
    )


@pytest.mark.case(143)
def test_a_plan_of_a_gguf_file_shows_no_librarys_bar_and_a_run_takes_it(file, tiny_run, tmp_path):
    words = [word for word in tiny_run if not word.startswith("model.source=")]
    words += [f"model.source='{file}'", "experiment=rtn_4bit", "threads=1"]
    command = [sys.executable, "-m", "claq_exp", "plan", *words]
    planned = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = planned.stderr.splitlines()
    assert line.startswith(f"converting {file} to float16 safetensors, once")
    assert "parameters" in planned.stdout
    assert main([*words, "~evaluation.corpora.wikipedia"]) == 0
    (folder,) = (tmp_path / "outputs/default").iterdir()
    assert run_state(folder).name == "finished"


@pytest.mark.case(144)
def test_whose_folder_of_the_cache_is_used_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))

    def slower(folder):
        cached_folder("models/x", lambda first: (first / "mine").write_text("first"))

    assert (cached_folder("models/x", slower) / "mine").read_text() == "first"
    assert "another process made it first; that one is used" in caplog.text
