"""A kept score is found by all that it depends on, and by nothing less."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from claq_exp.evaluation.scores import ScoreStore
from claq_exp.run.measuring import measured_on

SUBJECT = {"model": "abc", "versions": {"torch": "2.0"}, "dtype": "float32"}
MEASURE = {"perplexity": "def", "seqlen": 512}
SCORE = {"value": 12.25, "tokens": 511, "sha": "x", "none": None}


@pytest.fixture
def store(tmp_path) -> ScoreStore:
    store = ScoreStore(tmp_path / "scores", SUBJECT)
    store.keep(MEASURE, SCORE)
    return store


def test_a_score_comes_back_as_it_was(store):
    assert store.find(MEASURE) == SCORE
    assert ScoreStore(store.folder, dict(reversed(SUBJECT.items()))).find(MEASURE) == SCORE


@pytest.mark.parametrize(
    "subject",
    [
        {**SUBJECT, "model": "abd"},
        {**SUBJECT, "versions": {"torch": "2.1"}},
        {**SUBJECT, "dtype": "float16"},
        {**SUBJECT, "device": "cuda"},
    ],
)
def test_a_score_of_another_subject_is_not_found(subject, store):
    assert ScoreStore(store.folder, subject).find(MEASURE) is None


def test_a_score_of_another_processor_or_other_instructions_is_not_found(tmp_path, monkeypatch):
    config = SimpleNamespace(model=SimpleNamespace(dtype="float32"))

    def here() -> ScoreStore:
        subject = measured_on(config, "cpu", "abc", "def")
        return ScoreStore(tmp_path / "scores", subject)

    store = here()
    store.keep(MEASURE, SCORE)
    assert here().find(MEASURE) == SCORE
    for what, value in {
        "claq_exp.system.machine._processor": lambda: "Another 9000",
        "torch.backends.cpu.get_cpu_capability": lambda: "VSX",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(what, value)
            assert here().find(MEASURE) is None
    monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")
    assert here().find(MEASURE) is None


@pytest.mark.parametrize("measure", [{**MEASURE, "seqlen": 513}, {"perplexity": "def"}, {}])
def test_a_score_of_another_measure_is_not_found(measure, store):
    assert store.find(measure) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": 1, "score": {}}'])
def test_a_damaged_file_counts_as_none_and_is_replaced(content, store):
    (path,) = store.folder.iterdir()
    path.write_text(content, encoding="utf-8")
    assert store.find(MEASURE) is None
    store.keep(MEASURE, SCORE)
    assert store.find(MEASURE) == SCORE


def test_a_file_under_a_name_that_is_not_its_own_is_not_believed(store):
    (path,) = store.folder.iterdir()
    data = json.loads(path.read_text())
    data["key"]["subject"]["model"] = "other"
    path.write_text(json.dumps(data))
    assert store.find(MEASURE) is None


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    assert ScoreStore(tmp_path / "none", SUBJECT).find(MEASURE) is None
    assert not (tmp_path / "none").exists()
