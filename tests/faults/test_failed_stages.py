"""A stage that fails leaves what is done; the next try takes it over or starts over as asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from claq_exp.cli import main
from claq_exp.errors import SourceError
from claq_exp.evaluation import measure
from claq_exp.evaluation.divergence import LogitStore
from claq_exp.reporting import plots
from claq_exp.reporting.collect import read_run
from claq_exp.run import assist, job, measuring
from claq_exp.run_folder import RunFolder, run_state
from claq_exp.sources.cache import cache_folder
from claq_exp.tracking.events import read_events


@pytest.fixture
def outputs(tmp_path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def run(tiny_run):
    words = ["experiment=rtn_4bit", "threads=1", "calibration.windows=2"]
    words.append("evaluation.corpora.wikipedia.windows=2")
    return lambda *more: main([*tiny_run, *words, *more])


@pytest.fixture
def failing(monkeypatch):
    """Make a name of the stages, or of its bench, fail; the returned function repairs it."""

    def break_(name: str, error: BaseException):
        owner = next(owner for owner in (job, assist, measuring) if hasattr(owner, name))
        whole = getattr(owner, name)

        def fail(*args, **options):
            raise error

        monkeypatch.setattr(owner, name, fail)
        return lambda: monkeypatch.setattr(owner, name, whole)

    return break_


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """How many windows went through a model, measurement by measurement."""
    counts = []
    whole = measure.perplexity

    def count(predict, corpus, *rest):
        found = whole(predict, corpus, *rest)
        counts.append(len(corpus.windows))
        return found

    monkeypatch.setattr(measure, "perplexity", count)
    return counts


def only_folder(outputs: Path) -> Path:
    (folder,) = (outputs / "default").iterdir()
    return folder


def stages(folder: Path) -> list[str]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event["stage"] for event in map(json.loads, lines) if event["event"] == "stage"]


def identity_of(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


@pytest.mark.case(16, 90)
def test_a_failed_evaluation_keeps_the_checkpoint(run, outputs, failing, measured, capfd):
    repair = failing("load_checkpoint", SourceError("no luck"))
    assert run() == 1
    assert capfd.readouterr().err.splitlines()[-1] == "claq-exp: no luck"
    weights = only_folder(outputs) / "checkpoint" / "model.safetensors"
    before = identity_of(weights)
    assert not (only_folder(outputs) / "results.json").exists()
    repair()
    assert run() == 0
    assert identity_of(weights) == before
    done = stages(only_folder(outputs))
    assert done.count("export") == 1
    assert measured == [2, 2]  # the original and, in the second try, the checkpoint
    assert json.loads((only_folder(outputs) / "results.json").read_text())["status"] == "finished"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [None, Path.unlink, cut])
def test_between_original_and_quantized_the_original_is_measured_again_only_without_its_logits(
    damage, run, outputs, failing, measured
):
    assert run("evaluation.kl_windows=1") == 0
    folder = only_folder(outputs)
    whole = json.loads((folder / "results.json").read_text())
    assert measured == [2, 2]
    repair = failing("load_checkpoint", SourceError("no luck"))
    assert run("evaluation.kl_windows=1", "resume=never") == 1
    assert measured == [2, 2, 1]  # its perplexity was known
    logits = folder / "work" / "original_logits_0.npy"
    assert len(np.load(logits)) == 1
    if damage is not None:
        damage(logits)
    repair()
    assert run("evaluation.kl_windows=1") == 0
    again = json.loads((folder / "results.json").read_text())
    assert again["kl"] == whole["kl"]
    assert again["kl"]["wikipedia"]["mean"] > 0
    assert again["perplexity"] == whole["perplexity"]
    assert measured == [2, 2, 1, 2] if damage is None else [2, 2, 1, 1, 2]
    assert not (folder / "work").exists()


def test_a_kill_before_the_original_is_measured_leaves_no_logits_that_count(
    run, outputs, monkeypatch
):
    assert run() == 0
    folder = only_folder(outputs)
    whole = json.loads((folder / "results.json").read_text())
    record, seen = LogitStore.record, []

    def stop(store: LogitStore, corpus: str, window: int, logits: torch.Tensor) -> None:
        seen.append(window)
        if window == 1:
            raise KeyboardInterrupt
        record(store, corpus, window, logits)

    monkeypatch.setattr(LogitStore, "record", stop)
    assert run("resume=never") == 75
    assert seen == [0, 1]
    assert [path.name for path in (folder / "work").iterdir()] == [".original_logits_0.npy"]
    monkeypatch.setattr(LogitStore, "record", record)
    assert run() == 0
    assert json.loads((folder / "results.json").read_text())["kl"] == whole["kl"]


@pytest.mark.case(90)
def test_what_was_measured_of_the_checkpoint_is_kept_when_a_later_measure_fails(
    run, outputs, measured, monkeypatch, text_file, capfd
):
    words = ["+corpus@evaluation.corpora.more=text", f"evaluation.corpora.more.path={text_file}"]
    words += ["evaluation.corpora.more.windows=3", "evaluation.kl_windows=0"]
    counting = measure.perplexity

    def fail(model, corpus, *rest):
        if len(measured) == 3:
            raise SourceError("no luck")
        return counting(model, corpus, *rest)

    monkeypatch.setattr(measure, "perplexity", fail)
    assert run(*words) == 1
    assert measured == [2, 3, 2]
    monkeypatch.setattr(measure, "perplexity", counting)
    assert run(*words) == 0
    assert measured == [2, 3, 2, 3]
    results = json.loads((only_folder(outputs) / "results.json").read_text())
    assert {"wikipedia", "more"} == set(results["perplexity"])
    assert results["perplexity"]["more"]["tokens"] == 3 * 63


def test_the_original_is_measured_once_for_all_runs_on_the_same_tokens(run, outputs, measured):
    words = ["evaluation.kl_windows=0"]
    assert run(*words) == 0
    assert run(*words, "precision.bits=3") == 0
    assert run(*words, "precision.bits=3", "evaluation.corpora.wikipedia.windows=3") == 0
    assert measured == [2, 2, 2, 3, 3]
    rows = [json.loads(path.read_text())["perplexity"] for path in outputs.rglob("results.json")]
    assert len({row["wikipedia"]["original"] for row in rows}) == 2
    assert len(list((cache_folder() / "originals").iterdir())) == 2


def test_an_allocation_is_made_once_and_its_budget_kept(run, outputs, failing):
    repair = failing("quantize_model", SourceError("no luck"))
    words = ["experiment=linear/rate_distortion_3.3", "budget.bits=7.5", "allocation.windows=1"]
    assert run(*words) == 1
    allocation = only_folder(outputs) / "work" / "allocation.safetensors"
    before = identity_of(allocation)
    repair()
    repair = failing("write_checkpoint", SourceError("no luck"))
    assert run(*words) == 1
    assert identity_of(allocation) == before
    repair()
    assert run(*words) == 0
    assert stages(only_folder(outputs)).count("allocate") == 1
    results = json.loads((only_folder(outputs) / "results.json").read_text())
    assert results["bits"]["linear"] <= 7.5
    assert results["timings"]["allocate"] > 0


@pytest.mark.case(16)
def test_a_failed_export_keeps_the_blocks(run, outputs, failing):
    repair = failing("write_checkpoint", SourceError("no luck"))
    assert run() == 1
    state = only_folder(outputs) / "work" / "blocks" / "state.json"
    assert json.loads(state.read_text())["blocks"] == 3
    repair()
    assert run() == 0
    events = (only_folder(outputs) / "events.jsonl").read_text()
    assert events.count('"event": "block"') == 3


@pytest.mark.case(17)
def test_what_a_kill_left_of_an_unpublished_checkpoint_is_removed(run, outputs, failing):
    repair = failing("write_checkpoint", SourceError("no luck"))
    assert run() == 1
    left = only_folder(outputs) / ".checkpoint.k1ll3d"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    repair()
    assert run() == 0
    assert not left.exists()


def test_resume_required_needs_an_unfinished_run(run, outputs, failing, measured, capfd):
    assert run("resume=required") == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("claq-exp: ")]
    assert len(lines) == 1
    assert "resume=required" in lines[0]
    assert "holds no unfinished run" in lines[0]
    repair = failing("write_checkpoint", SourceError("no luck"))
    assert run() == 1
    repair()
    capfd.readouterr()
    assert run("resume=required", "seed=1") == 1
    assert "seed is 0 in place of 1" in capfd.readouterr().err
    assert run("resume=required") == 0
    assert measured == [2, 2]


@pytest.mark.case(18)
def test_a_finished_run_is_found_and_resume_never_starts_it_over(run, outputs, capfd):
    assert run() == 0
    assert run("resume=required") == 0
    assert "finished before" in capfd.readouterr().out
    folder = only_folder(outputs)
    before = {
        path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir() if path.is_file()
    }
    inode = identity_of(folder / "checkpoint" / "model.safetensors")
    first = json.loads((folder / "events.jsonl").read_text().splitlines()[0])["time"]
    assert run("resume=never") == 0
    after = {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
    assert after == before
    assert identity_of(folder / "checkpoint" / "model.safetensors") != inode
    assert json.loads((folder / "events.jsonl").read_text().splitlines()[0])["time"] > first


def test_resume_never_that_is_interrupted_is_not_found_finished(run, outputs, failing, capfd):
    assert run() == 0
    repair = failing("quantize_model", KeyboardInterrupt())
    assert run("resume=never") == 75
    repair()
    capfd.readouterr()
    assert run() == 0
    assert "finished before" not in capfd.readouterr().out
    assert (only_folder(outputs) / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.case(8)
def test_a_damaged_file_of_the_store_is_noted_and_made_again(run, outputs, failing, capfd):
    assert run() == 0
    whole = (only_folder(outputs) / "checkpoint" / "model.safetensors").read_bytes()
    repair = failing("write_checkpoint", SourceError("no luck"))
    assert run("resume=never") == 1
    block = only_folder(outputs) / "work" / "blocks" / "quantize_0001_00.safetensors"
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    repair()
    capfd.readouterr()
    assert run() == 0
    assert (only_folder(outputs) / "checkpoint" / "model.safetensors").read_bytes() == whole
    lines = (only_folder(outputs) / "events.jsonl").read_text().splitlines()
    (told,) = [event for event in map(json.loads, lines) if event["event"] == "damaged"]
    assert str(block) in told["what"]
    assert str(block) in capfd.readouterr().out


@pytest.mark.case(9)
def test_a_damaged_state_names_the_way_out(run, outputs, failing, capfd):
    repair = failing("write_checkpoint", SourceError("no luck"))
    assert run() == 1
    state = only_folder(outputs) / "work" / "blocks" / "state.json"
    state.write_text(state.read_text()[:-20])
    repair()
    capfd.readouterr()
    assert run() == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert str(state) in line
    assert "resume=never" in line
    assert run("resume=never") == 0


def test_a_results_file_that_is_no_json_is_one_line(run, outputs, capfd):
    assert run() == 0
    results = only_folder(outputs) / "results.json"
    results.write_text('{"status": "fin', encoding="utf-8")
    capfd.readouterr()
    assert run() == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{results} cannot be read" in line


def test_a_path_in_brackets_is_printed_as_it_is(run, tmp_path, capfd):
    outputs = tmp_path / "[runs]"
    assert run(f"outputs='{outputs}'") == 0
    captured = capfd.readouterr()
    assert f"{only_folder(outputs)}/results.json" in captured.out
    assert str(only_folder(outputs)) in captured.err


@pytest.mark.case(146)
def test_a_picture_that_cannot_be_drawn_is_a_note_of_a_finished_run(
    run, outputs, monkeypatch, capfd
):
    def fail(report, path):
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(plots, "plot_layers", fail)
    assert run() == 0
    captured = capfd.readouterr()
    assert "Note: layers.png could not be drawn: no font" in captured.out
    assert "layers.png\n" not in captured.out
    (folder,) = outputs.glob("default/*")
    assert run_state(folder).name == "finished"
    assert ("not_drawn", "no font") in [
        (name, data.get("error")) for name, data in read_events(folder / "events.jsonl")
    ]


@pytest.mark.case(146)
def test_a_state_that_cannot_be_written_does_not_fail_a_run_with_results(run, outputs, monkeypatch):
    note = RunFolder._note

    def full(self, state):
        if state["state"] == "finished":
            raise OSError(28, "No space left on device", "state.json")
        note(self, state)

    monkeypatch.setattr(RunFolder, "_note", full)
    assert run() == 0
    (folder,) = outputs.glob("default/*")
    assert run_state(folder).name == "finished"


@pytest.mark.case(145)
def test_an_old_run_with_its_old_name_of_the_settings_goes_on_and_gets_the_new_one(
    run, outputs, failing
):
    repair = failing("build_results", RuntimeError("broken"))
    assert run() == 1
    (folder,) = outputs.glob("default/*")
    (folder / "settings.json").rename(folder / "config.json")
    assert read_run(folder).config["seed"] == 0
    repair()
    assert run("resume=required") == 0
    assert not (folder / "config.json").exists()
    assert "command" in json.loads((folder / "settings.json").read_text())
