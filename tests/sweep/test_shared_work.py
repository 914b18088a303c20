"""What runs of a sweep share is done once, and comes out the same as done anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from claq_exp.allocate import model as allocating
from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.run import cut
from claq_exp.run.inputs import fetch, tokenize_inputs


@pytest.fixture
def cuts(monkeypatch) -> list[str]:
    """What is tokenized, one entry a text."""
    seen: list[str] = []
    cut_windows = cut.cut_windows

    def counted(text, draw, *rest):
        seen.append(draw.where)
        return cut_windows(text, draw, *rest)

    monkeypatch.setattr(cut, "cut_windows", counted)
    return seen


def tokens_of(words: list[str]):
    config = compose_config(words)
    fetched = fetch(config)
    return tokenize_inputs(config, fetched.model, fetched.contents)


@pytest.fixture
def words(tiny_run, tiny_model, text_file, tmp_path) -> list[str]:
    """The tiny run with a model and texts that a test may change."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copy(text_file, tmp_path / "words.txt")
    return [
        *tiny_run,
        f"model.source={tmp_path / 'model'}",
        f"calibration.path={tmp_path / 'words.txt'}",
    ]


def test_tokens_are_cut_once_and_are_the_same(words, cuts):
    first, second = tokens_of(words), tokens_of(words)
    assert cuts == ["calibration", "evaluation.corpora.wikipedia"]
    assert torch.equal(first.calibration, second.calibration)
    assert torch.equal(first.corpora["wikipedia"].windows, second.corpora["wikipedia"].windows)
    config = compose_config(words)
    anew = tokenize_inputs(config, fetch(config).model)
    assert torch.equal(first.calibration, anew.calibration)


@pytest.mark.parametrize(
    "change",
    [
        "seed=5",
        "calibration.windows=7",
        "calibration.seqlen=32",
        "calibration.draw=first",
        "calibration.draw=positions",
        "calibration.lines=stripped",
        "calibration.bos=window",
        "calibration.documents=1",
        "calibration.join=x",
    ],
)
def test_another_draw_or_reading_is_cut_for_itself(change, words, cuts):
    before = tokens_of(words)
    words = [*words, change]
    if "bos" in change:
        add_bos(Path(compose_config(words).model.source))
        tokens_of([word for word in words if word != change])
    after, count = tokens_of(words), cuts.count("calibration")
    assert count > 1
    config = compose_config(words)
    anew = tokenize_inputs(config, fetch(config).model)
    assert torch.equal(after.calibration, anew.calibration)
    assert before.calibration.dtype == after.calibration.dtype


def add_bos(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)


@pytest.mark.case(64)
def test_other_text_or_another_tokenizer_is_cut_again(words, cuts, tmp_path):
    tokens_of(words)
    text = tmp_path / "words.txt"
    text.write_text(text.read_text().replace("cat", "cow"))
    tokens_of(words)
    assert cuts.count("calibration") == 2
    path = tmp_path / "model/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    Tokenizer.from_file(str(path))
    swapped = tokens_of(words)
    assert cuts.count("calibration") == 3
    config = compose_config(words)
    assert torch.equal(
        swapped.calibration, tokenize_inputs(config, fetch(config).model).calibration
    )


def test_recipes_with_one_survey_make_it_once_and_get_what_they_would_have_got(
    tiny_run, tmp_path, monkeypatch
):
    surveys = []
    survey = allocating.survey_model

    def counted(*args, **options):
        surveys.append(options["gradients"])
        return survey(*args, **options)

    monkeypatch.setattr(allocating, "survey_model", counted)
    words = [*tiny_run, "allocation=rate_distortion", "allocation.reserve=false", "threads=1"]
    words += ["allocation.windows=4", "~evaluation.corpora.wikipedia", "budget.bits=13"]

    def layers(name: str, *more: str) -> str:
        assert main([*words, f"name={name}", *more]) == 0
        (path,) = (tmp_path / "outputs" / name).glob("*/checkpoint/model.safetensors")
        return path.read_bytes()

    layers("one", "budget.bits=14")
    shared = layers("two")
    assert surveys == [True]
    layers("three", "allocation.importance=output")
    layers("four", "solver.damping=0.1")
    layers("five", "seed=9")
    assert surveys == [True, False, True, True]
    monkeypatch.setattr("claq_exp.run.job.kept_tensors", lambda kind, key, make: make())
    assert layers("anew") == shared
    assert len(surveys) == 5
