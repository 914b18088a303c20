"""`claq-exp evaluate` gives a run's table again, the original's column and the KL included."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from task_rows import made_rows, write_rows

from claq_exp.cli import main
from claq_exp.evaluation import measure
from claq_exp.run.origin import recorded_origin
from claq_exp.sources.cache import cache_folder

WORDS = ["experiment=rtn_4bit", "threads=1", "device=cpu", "calibration.windows=2"]
SHORT = ["evaluation.corpora.wikipedia.windows=2", "evaluation.kl_windows=1"]


@pytest.fixture(scope="module")
def words(tiny_model, text_file, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("evaluated")
    data = write_rows(folder / "rows.jsonl", made_rows("piqa", 3))
    return [
        "model=hf",
        f"model.source={tiny_model}",
        "calibration=text",
        f"calibration.path={text_file}",
        "calibration.seqlen=64",
        "evaluation=perplexity",
        f"evaluation.corpora.wikipedia.path={text_file}",
        "evaluation.context=64",
        "+evaluation.zero_shot.piqa.metric=acc",
        f"+evaluation.zero_shot.piqa.data={data}",
        "tracking=none",
        f"outputs={folder / 'outputs'}",
        *WORDS,
        *SHORT,
    ]


@pytest.fixture(scope="module")
def finished(words) -> Path:
    """A run of the tiny model."""
    assert main(words) == 0
    outputs = Path(next(word for word in words if word.startswith("outputs=")).partition("=")[2])
    return next((outputs / "default").iterdir())


@pytest.fixture
def source(tiny_model, tmp_path) -> Path:
    """The original, to be changed at will."""
    return Path(shutil.copytree(tiny_model, tmp_path / "original"))


@pytest.fixture
def run(finished, source, tmp_path) -> Path:
    """The same run, of `source`."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    path = record_of(folder)
    written = json.loads(path.read_text())
    written["config"]["model"]["source"] = str(source)
    path.write_text(json.dumps(written))
    return folder


def record_of(folder: Path) -> Path:
    """The file of a run's folder that says what the run is."""
    return next(
        path for path in folder.glob("*.json") if "contents" in json.loads(path.read_text())
    )


@pytest.fixture
def evaluate(words, tmp_path, capfd):
    """Evaluate a checkpoint without a word about its model; return the results and the output."""
    others = [word for word in words if not word.startswith(("model", "outputs"))]

    def command(checkpoint: Path, *more: str, code: int = 0) -> tuple[dict, str]:
        capfd.readouterr()
        arguments = [*others, f"checkpoint={checkpoint}", f"outputs={tmp_path / 'outputs'}", *more]
        assert main(["evaluate", *arguments]) == code
        output = capfd.readouterr()
        if code:
            return {}, output.err
        path = Path(output.out.strip().splitlines()[-1])
        return json.loads(path.read_text()), output.out

    return command


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """How many windows went through a model, measurement by measurement."""
    counts, whole = [], measure.perplexity

    def count(predict, corpus, *rest):
        counts.append(len(corpus.windows))
        return whole(predict, corpus, *rest)

    monkeypatch.setattr(measure, "perplexity", count)
    return counts


def table_of(results: dict) -> dict:
    rows = {
        name: {key: value for key, value in row.items() if key != "overlap"}
        for name, row in results["perplexity"].items()
    }
    parts = ("kl", "zero_shot", "average_accuracy", "bits", "size")
    return {"perplexity": rows, **{key: results[key] for key in parts}}


@pytest.mark.case(137)
def test_the_table_of_the_run_comes_back_and_the_original_is_not_measured_again(
    words, finished, evaluate, measured, tmp_path
):
    assert main([*words, "resume=never"]) == 0  # keeps the original's scores
    expected = json.loads((finished / "results.json").read_text())
    assert measured == [2, 2]
    for checkpoint in (finished, finished / "checkpoint"):
        found, output = evaluate(checkpoint)
        assert table_of(found) == table_of(expected)
        assert "KL from original" in output
        assert "Note" not in output
        assert found["original"]["source"] == expected["config"]["model"]["source"]
    assert measured[2:] == [1, 2] * 2  # the original for its logits alone, and the checkpoint
    shutil.rmtree(cache_folder() / "originals")
    assert table_of(evaluate(finished)[0]) == table_of(expected)
    assert measured[6:] == [2, 2]
    assert list((tmp_path / "outputs").rglob("work")) == []


@pytest.mark.case(137)
def test_a_checkpoint_away_from_its_run_has_no_original_until_it_is_named(
    run, evaluate, source, tmp_path
):
    moved = shutil.copytree(run / "checkpoint", tmp_path / "moved")
    found, output = evaluate(moved)
    said = f"Note: the original is left out: it is not known, for {moved} is not in the folder of"
    assert said in output
    assert (found["original"], found["kl"]) == (None, {})
    row = found["perplexity"]["wikipedia"]
    assert row["original"] is None
    expected = json.loads((run / "results.json").read_text())
    assert row["quantized"] == expected["perplexity"]["wikipedia"]["quantized"]
    named, output = evaluate(moved, "model=hf", f"model.source={source}")
    assert table_of(named) == table_of(expected)
    assert "Note" not in output


@pytest.mark.case(137)
def test_an_original_that_is_gone_or_changed_is_left_out_with_a_line(run, evaluate, source):
    weights = source / "model.safetensors"
    model = tiny_llama(seed=1)
    model.save_pretrained(source)
    found, output = evaluate(run)
    said = f"the original is left out: the files of {source} are not those that were quantized"
    assert said in output
    assert found["perplexity"]["wikipedia"]["original"] is None
    named, output = evaluate(run, "model=hf", f"model.source={source}")
    assert f"Note: {source} is not the model that was quantized" in output
    assert named["kl"]["wikipedia"]["mean"] > 0
    weights.unlink()
    shutil.rmtree(source)
    _, output = evaluate(run)
    assert f"the original is left out: model folder '{source}' does not exist" in output
    _, error = evaluate(run, "model=hf", f"model.source={source}", code=2)
    assert f"model folder '{source}' does not exist" in error


@pytest.mark.case(137)
def test_an_original_of_another_kind_is_refused(run, evaluate, tmp_path):
    other = tmp_path / "other"
    tiny_llama(vocab_size=300).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    _, error = evaluate(run, "model=hf", f"model.source={other}", code=2)
    assert "has a vocabulary of 300, the checkpoint one of 256" in error
    shutil.rmtree(other)
    tiny_llama(max_position_embeddings=32).save_pretrained(other)
    _, error = evaluate(run, "model=hf", f"model.source={other}", code=2)
    assert "evaluation.context is 64, the model's context 32" in error


@pytest.mark.case(137)
def test_an_original_that_is_not_wanted_or_does_not_fit_is_left_out(run, evaluate, monkeypatch):
    found, output = evaluate(run, "original=false")
    assert found["original"] is None
    assert "Note" not in output
    monkeypatch.setattr("claq_exp.run.evaluate.free_memory", lambda device: 1000)
    found, output = evaluate(run)
    assert "the original is left out: it takes about 0.0 GiB of memory" in output
    assert found["original"] is None
    assert evaluate(run, "check_resources=false")[0]["original"] is not None


@pytest.mark.case(137)
def test_the_record_of_a_run_allows_no_code(run):
    path = record_of(run)
    written = json.loads(path.read_text())
    written["config"]["model"]["trust_remote_code"] = True
    path.write_text(json.dumps(written))
    origin = recorded_origin(run / "checkpoint")
    assert origin is not None
    assert not origin.model.trust_remote_code
    path.write_text("{")
    assert recorded_origin(run / "checkpoint") is None


@pytest.mark.case(136, 137)
@pytest.mark.parametrize("strict", [False, True])
def test_a_checkpoint_whose_perplexity_is_not_finite_is_told(strict, run, evaluate, monkeypatch):
    whole, seen = measure.perplexity, []

    def broken(*arguments):
        seen.append(whole(*arguments))
        if len(seen) == 1:  # the original's, for its logits
            return seen[0]
        return type(seen[1])(**{**vars(seen[1]), "value": math.nan})

    monkeypatch.setattr(measure, "perplexity", broken)
    found, output = evaluate(run, f"strict={str(strict).lower()}", code=int(strict))
    assert "the perplexity of wikipedia is not finite, where the original's is" in output
    assert strict or found["perplexity"]["wikipedia"]["quantized"] is None


@pytest.mark.case(134)
def test_evaluating_leaves_the_checkpoint_as_it_is(run, evaluate):
    before = {path.name: path.read_bytes() for path in (run / "checkpoint").iterdir()}
    state = torch.get_default_dtype(), torch.is_grad_enabled()
    evaluate(run)
    assert {path.name: path.read_bytes() for path in (run / "checkpoint").iterdir()} == before
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == state
