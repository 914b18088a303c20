"""All runs below folders are found, whatever has become of them, in results old and new."""

from __future__ import annotations

import json

import pytest
from run_samples import RESULTS, result, write_runs, write_state

from claq_exp.errors import ConfigError
from claq_exp.reporting.collect import collect, lookup
from claq_exp.run_folder import FAILED, FINISHED, KILLED, RunState
from claq_exp.run_folder.jobs import Job, write_job


def one(tmp_path, results):
    (run,) = collect([write_runs(tmp_path, results)]).runs
    return run


def test_every_number_of_a_run_is_a_measure_with_its_original(tmp_path):
    found = one(tmp_path, result()).measures
    values = {key: (measure.quantized, measure.original) for key, measure in found.items()}
    assert values == {
        "bits.linear": (3.4, 16.0),
        "bits.nominal": (2.57, 16.0),
        "bits.model": (4.0, 16.0),
        "bits.activation": (16.0, 16.0),
        "size.checkpoint": (5.0, 20.0),
        "time.total": (60.0, None),
        "time.load": (1.5, None),
        "time.solve": (20.0, None),
        "memory.peak": (1.0, None),
        "perplexity.words": (25.25, 20.0),
        "kl.words": (0.12345, 0.0),
        "accuracy.piqa": (65.5, 71.0),
    }
    assert found["accuracy.piqa"].stderr == 3.0
    assert found["accuracy.piqa"].better == "higher"
    assert {found[key].better for key in ("bits.linear", "perplexity.words")} == {"lower"}


def test_a_task_without_accuracy_keeps_its_unit_and_the_average_is_a_measure(tmp_path):
    task = {"metric": "word_perplexity", "original": 21.5, "quantized": 30.25, "rows": 62}
    average = {"original": 0.715, "quantized": 0.5}
    results = result({"average_accuracy": average})
    results["zero_shot"]["wikitext"] = {**task, "stderr": None}
    found = one(tmp_path, results).measures
    assert found["score.wikitext"].quantized == 30.25
    assert found["score.wikitext"].better == "lower"
    assert found["average.accuracy"].quantized == 50.0
    assert found["average.accuracy"].content.startswith("piqa")


@pytest.mark.case(88)
def test_older_results_have_the_measures_that_they_have(tmp_path):
    old = result(
        {
            "kl": None,
            "average_accuracy": None,
            "timings": None,
            "peak_memory_bytes": None,
            "perplexity.words.tokens_sha256": None,
            "zero_shot.piqa.requests_sha256": None,
            "zero_shot.piqa.stderr": None,
            "run.seconds": None,
            "schema": None,
        }
    )
    found = one(tmp_path, old).measures
    assert "kl.words" not in found
    assert "average.accuracy" not in found
    assert found["perplexity.words"].quantized == 25.25
    assert found["perplexity.words"].content == "12345:"
    assert found["accuracy.piqa"].stderr is None
    assert found["memory.peak"].quantized is None
    assert found["time.total"].quantized is None


def test_finished_runs_come_first_by_model_and_linear_bits(tmp_path):
    folder = write_runs(
        tmp_path,
        result({"bits.linear": 4.5}),
        result({"config.model.name": "another"}),
        result({"bits.linear": 2.5}),
    )
    write_state(tmp_path / "name" / "aaa", {"state": "failed", "reason": "no memory"})
    found = collect([folder])
    assert [run.name for run in found.runs] == ["run-1", "run-2", "run-0", "aaa"]
    assert [run.name for run in found.finished] == ["run-1", "run-2", "run-0"]
    assert found.notes == []


@pytest.mark.case(81)
def test_failed_killed_interrupted_and_running_are_told_apart(tmp_path):
    import filelock

    below = tmp_path / "name"
    config = {"precision": {"target_bits": 2.5}}
    write_state(below / "failed", {"state": "failed", "reason": "NaN in a Hessian"}, config)
    write_state(below / "killed", {"state": "running", "process": "process 7 on vm"})
    write_state(below / "interrupted", {"state": "interrupted"})
    running = write_state(below / "running", {"state": "running", "process": "process 8 on vm"})
    with filelock.FileLock(running / ".lock"):
        found = {run.name: run for run in collect([tmp_path]).runs}
    assert {name: run.state.name for name, run in found.items()} == {
        name: name for name in ("failed", "killed", "interrupted", "running")
    }
    assert found["failed"].state.reason == "NaN in a Hessian"
    assert found["killed"].state.reason == "process 7 on vm"
    assert found["failed"].config == config
    assert found["killed"].config == {}
    assert all(run.measures == {} for run in found.values())


def test_a_run_whose_state_is_lost_is_still_there(tmp_path):
    folder = tmp_path / "name" / "old"
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("{}\n")
    (run,) = collect([tmp_path]).runs
    assert run.state.name == "unknown"
    assert "state.json" in run.state.reason


def test_files_inside_a_run_are_no_runs(tmp_path):
    folder = write_runs(tmp_path, result())
    blocks = folder / "name" / "run-0" / "work" / "blocks"
    blocks.mkdir(parents=True)
    (blocks / "state.json").write_text('{"version": 1}')
    write_runs(folder / "work", result())  # a sweep may be called so
    assert [run.name for run in collect([folder]).runs] == ["run-0", "run-0"]


def test_jobs_that_failed_before_they_had_a_folder_are_there(tmp_path):
    folder = write_runs(tmp_path, result()) / "name"
    words = ("precision.target_bits=9", "reservation=none")
    write_job(folder, Job(0, words, RunState(FAILED, "no such width")))
    write_job(folder, Job(1, ("seed=1",), RunState(FINISHED), folder="run-0"))
    write_job(folder, Job(2, ("seed=2",), RunState(KILLED, "process 9 on vm")))
    found = collect([tmp_path]).runs
    assert [(run.name, run.state.name) for run in found] == [
        ("run-0", "finished"),
        ("precision.target_bits=9 reservation=none", "failed"),
        ("seed=2", "killed"),
    ]
    assert found[1].folder is None
    assert found[1].overrides == words


def test_a_job_that_failed_with_a_folder_is_there_once_with_its_overrides(tmp_path):
    below = tmp_path / "name"
    config = {
        "model": {"name": "tiny", "source": "a/b"},
        "precision": {"name": "fixed", "target_bits": 2.5},
        "seed": 1,
        "name": "name",
    }
    words = ("precision.target_bits=2.5", "+precision=fixed", "experiment=x", "name=name")
    words += ("model=hf", "model.source=a/b", "~tracking")
    failed = {"state": "failed", "reason": "no memory"}
    write_state(below / "bad", failed, config)
    write_state(below / "also", failed, {**config, "seed": 2})
    write_state(below / "gone", {"state": "running", "process": "process 1 on vm"}, config)
    write_job(below, Job(0, (*words, "seed=1"), RunState(FAILED, "no memory")))
    write_job(below, Job(1, (*words, "seed=3"), RunState(FAILED, "no memory")))
    write_job(below, Job(2, (*words, "seed=1", "a=2"), RunState(KILLED, "signal 9")))
    write_job(below, Job(3, (*words, "seed=2"), RunState(FAILED, "another reason")))
    write_job(below, Job(4, (*words, "model.source=c", "seed=2"), RunState(FAILED, "no memory")))
    found = [(run.name, run.state.reason, run.overrides[-1:]) for run in collect([below]).runs]
    assert found == [
        ("also", "no memory", ()),
        ("bad", "no memory", ("seed=1",)),
        ("gone", "signal 9", ("a=2",)),
        (" ".join((*words, "model.source=c", "seed=2")), "no memory", ("seed=2",)),
        (" ".join((*words, "seed=2")), "another reason", ("seed=2",)),
        (" ".join((*words, "seed=3")), "no memory", ("seed=3",)),
    ]


def test_records_of_single_calls_below_a_sweep_are_no_more_jobs(tmp_path):
    write_runs(tmp_path, result())
    calls = (tmp_path / "name" / "calls" / "first", tmp_path / ".multirun" / "first")
    for place in (tmp_path / "name", *calls):
        write_job(place, Job(0, ("seed=9",), RunState(FAILED, "reason")))
    write_job(tmp_path / "other", Job(0, ("seed=9",), RunState(FAILED, "reason")))
    assert [run.name for run in collect([tmp_path]).runs] == ["run-0", "seed=9", "seed=9"]


def test_a_run_below_two_of_the_folders_is_there_once(tmp_path):
    folder = write_runs(tmp_path, result())
    write_job(folder / "name", Job(0, ("seed=9",), RunState(FAILED, "reason")))
    assert len(collect([folder, folder / "name", folder / "name" / "run-0"]).runs) == 2


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (json.dumps(result({"schema": 2})), "schema 2; update claq_exp"),
        (json.dumps({"schema": "x", "status": "finished"}), "schema x; update"),
        ("{", "results.json cannot be read"),
        (json.dumps(result({"status": "evaluated", "config": None})), "results that are evaluated"),
        (json.dumps(result({"bits": None})), "has no 'bits'"),
    ],
    ids=["newer", "odd", "broken", "evaluated", "incomplete"],
)
def test_what_cannot_be_shown_is_left_out_with_a_note(content, note, tmp_path):
    folder = write_runs(tmp_path, result())
    other = folder / "name" / "other"
    other.mkdir()
    (other / "results.json").write_text(content, encoding="utf-8")
    found = collect([folder])
    assert [run.name for run in found.runs] == ["run-0"]
    (line,) = found.notes
    assert note in line
    assert str(other) in line
    with pytest.raises(ConfigError, match="no finished run below") as refused:
        collect([other])
    assert note in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_folder_and_no_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing' is no folder"):
        collect([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match=f"no finished run below '{tmp_path}'"):
        collect([tmp_path])


def test_rows_of_layers_hold_numbers_and_none(tmp_path):
    assert one(tmp_path, result()).layers == []
    text = "block,name,bits,damping\n0,q_proj,2.5,\n-1,in_proj,1e-05,inf\n"
    (tmp_path / "name" / "run-0" / "layers.csv").write_text(text)
    (run,) = collect([tmp_path]).runs
    assert run.layers == [
        {"block": 0, "name": "q_proj", "bits": 2.5, "damping": None},
        {"block": -1, "name": "in_proj", "bits": 1e-05, "damping": float("inf")},
    ]
    assert isinstance(run.layers[0]["block"], int)


def test_dotted_keys_are_looked_up():
    assert lookup(RESULTS["config"], "precision.target_bits") == 2.5
    assert lookup(RESULTS["config"], "precision") == RESULTS["config"]["precision"]
    assert lookup(RESULTS["config"], "precision.bits") is None
    assert lookup(RESULTS["config"], "precision.name.more") is None


def test_the_model_after_a_stage_is_measured_beside_the_end(tmp_path):
    after = {
        "perplexity": {"words": 23.0},
        "kl": {"words": 0.1},
        "zero_shot": {"piqa": 0.66},
        "average_accuracy": None,
    }
    folder = write_runs(tmp_path, result({"after": {"quantize": after}}), result())
    measures = max((run.measures for run in collect([folder]).runs), key=len)
    for key, value in {
        "perplexity.words_after_quantize": 23.0,
        "kl.words_after_quantize": 0.1,
        "accuracy.piqa_after_quantize": 66.0,
    }.items():
        assert measures[key].quantized == value
        end = measures[key.removesuffix("_after_quantize")]
        assert (measures[key].original, measures[key].content) == (end.original, end.content)
        assert measures[key].label == f"{end.label}, after quantize"


def test_damaged_values_after_a_stage_are_told(tmp_path):
    after = {"perplexity": {"words": "x"}, "kl": {}, "zero_shot": {}, "average_accuracy": None}
    folder = write_runs(tmp_path, result({"after": {"quantize": after}}), result())
    assert "damaged" in collect([folder]).notes[0]
