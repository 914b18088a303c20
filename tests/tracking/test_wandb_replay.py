"""A W&B run that was lost is rebuilt from the run folder; a report's table is a W&B run too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_wandb_mirror import named, records

from claq_exp.cli import main
from claq_exp.reporting.replay import read_events
from claq_exp.run_folder import LOCK_FILE

OWN = ("_timestamp", "_runtime", "_step", "_wandb")  # of the moment, not of the run


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    return subprocess.run(
        [sys.executable, "-m", "claq_exp", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=cwd,
    )


def content(file: Path) -> dict:
    """What a W&B run holds, without times."""
    found = list(records(file))
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    history, summary, exits = [], {}, []
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(own(named(record.history.item)))
        elif kind == "summary":
            summary |= own(named(record.summary.update))
        elif kind == "exit":
            exits.append(record.exit.exit_code)
    return {
        "project": run.project,
        "name": run.display_name,
        "group": run.run_group,
        "job type": run.job_type,
        "tags": list(run.tags),
        "config": {
            item.key: json.loads(item.value_json)
            for item in run.config.update
            if item.key not in OWN
        },
        "history": history,
        "summary": summary,
        "exits": exits,
    }


def own(values: dict) -> dict:
    return {key: value for key, value in values.items() if key.partition("/")[0] not in OWN}


def tables(folder: Path) -> list[dict]:
    """The tables beside a .wandb file."""
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.table.json"))]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tiny_model, text_file) -> Path:
    """The folder of a finished run that was tracked offline."""
    place = tmp_path_factory.mktemp("tracked")
    words = [
        *("experiment=rtn_4bit", "model=hf", f"model.source={tiny_model}", "calibration=text"),
        *(f"calibration.path={text_file}", "calibration.windows=2", "calibration.seqlen=32"),
        *("evaluation=perplexity", f"evaluation.corpora.wikipedia.path={text_file}"),
        *("evaluation.corpora.wikipedia.windows=2", "evaluation.context=64", "threads=1"),
        *("tracking=wandb", "tracking.project=mine", "tracking.group=g", "tracking.tags=[a,b]"),
    ]
    result = command(*words, f"outputs={place}", cwd=place)
    assert result.returncode == 0, result.stderr
    (folder,) = (place / "default").iterdir()
    return folder


def wandb_file(folder: Path) -> Path:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return file


@pytest.fixture
def lost(tracked, tmp_path) -> Path:
    """The same run without what W&B wrote."""
    folder = tmp_path / tracked.name
    shutil.copytree(tracked, folder, ignore=shutil.ignore_patterns("wandb", "checkpoint"))
    return folder


@pytest.mark.case(95)
def test_a_replayed_run_is_the_run_that_was_lost(tracked, lost, tmp_path):
    result = command("report", "--replay", str(lost), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{lost}/wandb"]
    live, replayed = content(wandb_file(tracked)), content(wandb_file(lost))
    for what, value in live.items():
        if what not in ("history", "summary"):
            assert replayed[what] == value, what
    assert live["project"] == "mine"
    assert live["exits"] == [0]
    assert len([step for step in live["history"] if "layer/bits" in step]) == 3 * 7
    assert without_files(replayed["history"]) == without_files(live["history"])
    assert without_files([replayed["summary"]]) == without_files([live["summary"]])
    (table,) = tables(wandb_file(tracked).parent)
    assert tables(wandb_file(lost).parent) == [table]
    assert table["data"]


def without_files(steps: list[dict]) -> list[dict]:
    """Leave out where a table was put, which has a random name."""
    random = ("path", "sha256", "_latest_artifact_path", "artifact_path")
    return [
        {
            key: {k: v for k, v in value.items() if k not in random}
            if isinstance(value, dict)
            else value
            for key, value in step.items()
            if key.rpartition("/")[2] not in random
        }
        for step in steps
    ]


def test_a_line_that_a_kill_cut_short_is_left_out(lost, tmp_path):
    events = lost / "events.jsonl"
    whole = list(read_events(events))
    assert whole[0][0] == "started"
    assert set(whole[1][1]) >= {"stage", "load"}
    with events.open("a") as file:
        file.write('{"time": 1, "event": "layer", "name": "q_')
    assert list(read_events(events)) == whole
    assert command("report", "--replay", str(lost), cwd=tmp_path).returncode == 0
    layers = [step for step in content(wandb_file(lost))["history"] if "layer/bits" in step]
    assert len(layers) == 3 * 7


@pytest.mark.case(95)
def test_a_killed_run_is_replayed_as_far_as_it_came(lost, tmp_path):
    (lost / "results.json").unlink()
    (lost / "state.json").write_text('{"state": "running", "process": "process 1 on vm"}')
    lines = (lost / "events.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"finished"' not in line and '"quantized"' not in line]
    (lost / "events.jsonl").write_text("\n".join(kept) + "\n")
    result = command("report", "--replay", str(lost), "--project", "other", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = content(wandb_file(lost))
    assert (found["project"], found["exits"]) == ("other", [1])
    assert len([step for step in found["history"] if "layer/bits" in step]) == 3 * 7
    assert found["config"]["precision"] == {"name": "fixed", "bits": 4}


def test_a_running_run_and_no_run_are_refused(lost, tmp_path, capfd):
    import filelock

    (lost / "results.json").unlink()
    (lost / "state.json").write_text('{"state": "running"}')
    with filelock.FileLock(lost / LOCK_FILE):
        assert main(["report", "--replay", str(lost)]) == 2
    assert "is going on" in capfd.readouterr().err
    assert main(["report", "--replay", str(tmp_path)]) == 2
    assert "is no run folder, there is no events.jsonl in it" in capfd.readouterr().err
    assert not (lost / "wandb").exists()


def test_a_replay_that_fails_is_one_line_and_exit_one_and_the_next_is_tried(
    lost, monkeypatch, capfd
):
    import wandb

    def fail(**options):
        raise wandb.Error("the service is down")

    monkeypatch.setattr(wandb, "init", fail)
    assert main(["report", "--replay", str(lost), str(lost)]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "Weights & Biases failed and was left out: the service is down" in line


def test_a_report_is_a_wandb_table_with_the_rows_of_its_csv(tracked, tmp_path):
    import pandas as pd

    into = tmp_path / "report"
    words = ["report", str(tracked), "--into", str(into), "--wandb"]
    result = command(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Logged to Weights & Biases (offline), project mine" in result.stdout
    found = content(wandb_file(into))
    assert (found["project"], found["job type"], found["exits"]) == ("mine", "report", [0])
    assert found["config"]["runs"] == [tracked.name]
    (table,) = tables(into / "wandb")
    frame = pd.read_csv(into / "report.csv")
    assert table["columns"] == list(frame.columns)
    place = table["columns"].index("wikipedia perplexity")
    assert [row[place] for row in table["data"]] == frame["wikipedia perplexity"].tolist()
    assert [row[-1] for row in table["data"]] == [True, False]


def test_a_wandb_that_fails_leaves_the_report_and_a_note(tracked, tmp_path, monkeypatch, capfd):
    import wandb

    def fail(**options):
        raise wandb.Error("the service is down\nmore")

    monkeypatch.setattr(wandb, "init", fail)
    assert main(["report", str(tracked), "--into", str(tmp_path), "--wandb"]) == 0
    output = capfd.readouterr().out
    assert "Note: Weights & Biases failed and was left out: the service is down\n" in output
    assert (tmp_path / "report.csv").is_file()
