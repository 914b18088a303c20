"""Weights & Biases mirrors a run, offline here; without it the run is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from wandb_files import named, records

from claq_exp.cli import main
from claq_exp.tracking.limits import TrackingConfig
from claq_exp.tracking.wandb import WandbTracker, comparison_rows


@pytest.fixture
def overrides(tiny_run) -> list[str]:
    words = [word for word in tiny_run if not word.startswith("tracking=")]
    return [*words, "tracking=wandb", "experiment=rtn_4bit", "threads=1"]


def test_an_offline_run_holds_config_layers_summary_and_exit_code(overrides, tmp_path):
    words = [*overrides, "tracking.group=pairs", "tracking.tags=[one,two]"]
    environment = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    command = [sys.executable, "-m", "claq_exp", *words]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "Note: Weights" not in result.stdout
    (folder,) = (tmp_path / "outputs" / "default").iterdir()
    results = json.loads((folder / "results.json").read_text())
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = list(records(file))

    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, list(run.tags)) == ("claq_exp", "pairs", ["one", "two"])
    assert run.display_name == folder.name
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["precision"] == {"name": "fixed", "bits": 4}
    assert config["model"]["name"] == "tiny"

    history = [
        named(record.history.item)
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    layers = [step for step in history if "layer/bits" in step]
    assert len(layers) == 3 * 7
    assert all(step["layer/bits"] > 4 for step in layers)
    assert layers[0]["layer/name"] == "model.layers.0.self_attn.q_proj"
    values = {key: value for step in history for key, value in step.items()}
    row = results["perplexity"]["wikipedia"]
    assert values["perplexity/wikipedia/original"] == pytest.approx(row["original"])
    assert values["perplexity/wikipedia/quantized"] == pytest.approx(row["quantized"])

    summary: dict = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= named(record.summary.update)
    assert summary["bits"]["linear"] == pytest.approx(results["bits"]["linear"])
    assert summary["size"] == results["size"]
    divergence = results["kl"]["wikipedia"]
    assert values["kl/wikipedia/quantized"] == pytest.approx(divergence["mean"])
    assert summary["kl"]["wikipedia"] == pytest.approx(divergence)
    assert summary["comparison/nrows"] == 1
    assert [
        record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"
    ] == [0]


@pytest.mark.case(94)
def test_a_wandb_that_fails_to_start_leaves_the_run_and_a_note(
    overrides, tmp_path, monkeypatch, capfd
):
    import wandb

    def fail(**options):
        raise wandb.Error("the service is down")

    monkeypatch.setattr(wandb, "init", fail)
    assert main(overrides) == 0
    output = capfd.readouterr().out
    assert "Note: Weights & Biases failed and was left out: the service is down" in output
    (results,) = (tmp_path / "outputs").rglob("results.json")
    assert json.loads(results.read_text())["status"] == "finished"


class FakeRun:
    """A W&B run that breaks down after some calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.logged: list[dict] = []
        self.exit_codes: list[int] = []
        self.summary: dict = {}

    def log(self, metrics: dict) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("connection lost")
        self.logged.append(metrics)

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def tracker(monkeypatch, tmp_path, run: FakeRun) -> WandbTracker:
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: run)
    return WandbTracker(TrackingConfig("wandb"), tmp_path, "name", {})


LAYER = {"name": "q", "bits": 3.0, "output_error": None, "seconds": 0.1, "block": 0}


@pytest.mark.case(94)
def test_after_the_first_failure_the_rest_is_skipped_and_told_once(monkeypatch, tmp_path):
    run = FakeRun(calls=2)
    mirror = tracker(monkeypatch, tmp_path, run)
    for _ in range(5):
        mirror.event("layer", LAYER)
    assert len(run.logged) == 2
    assert mirror.failure == "Weights & Biases failed and was left out: connection lost"


@pytest.mark.case(94)
def test_a_run_that_broke_down_is_still_closed(monkeypatch, tmp_path):
    run = FakeRun(calls=0)
    mirror = tracker(monkeypatch, tmp_path, run)
    mirror.event("layer", LAYER)
    mirror.finish(None)
    assert run.exit_codes == [1]


@pytest.mark.case(134)
def test_what_wandb_changes_of_its_arguments_is_its_own(monkeypatch, tmp_path):
    import wandb

    class Greedy(dict):
        def update(self, values: dict) -> None:
            values["bits"]["linear"] = None

    run = FakeRun(calls=9)
    run.summary = Greedy()

    def init(**options):
        options["config"]["model"].clear()
        options["tags"].append("more")
        return run

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "Table", lambda **options: None)
    config, tracking = {"model": {"name": "tiny"}}, TrackingConfig("wandb", tags=["one"])
    results = {"perplexity": {}, "zero_shot": {}, "size": {}, "kl": {}, "timings": {}}
    results["bits"] = {"linear": 3.5}
    mirror = WandbTracker(tracking, tmp_path, "name", config)
    mirror.finish(results)
    assert mirror.failure is None
    assert (config, tracking.tags) == ({"model": {"name": "tiny"}}, ["one"])
    assert results["bits"] == {"linear": 3.5}


def test_a_failed_run_is_closed_with_exit_code_one(monkeypatch, tmp_path):
    run = FakeRun(calls=9)
    tracker(monkeypatch, tmp_path, run).finish(None)
    assert run.exit_codes == [1]


def test_events_that_are_no_numbers_are_not_mirrored(monkeypatch, tmp_path):
    run = FakeRun(calls=9)
    mirror = tracker(monkeypatch, tmp_path, run)
    mirror.event("stage", {"stage": "load", "load": 1.0})
    mirror.event("perplexity", {"dataset": "words", "model": "original", "value": 7.5})
    assert run.logged == [{"perplexity/words/original": 7.5}]


def test_the_comparison_has_a_row_for_each_measure():
    results = {
        "perplexity": {"words": {"original": 5.0, "quantized": 6.0, "tokens": 9}},
        "zero_shot": {"piqa": {"metric": "acc", "original": 0.7, "quantized": 0.6, "rows": 5}},
    }
    assert comparison_rows(results) == [
        {"measure": "perplexity words", "original": 5.0, "quantized": 6.0},
        {"measure": "piqa acc", "original": 0.7, "quantized": 0.6},
    ]
