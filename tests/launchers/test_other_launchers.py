"""With every launcher and sweeper, a job that fails or dies stops no other and stays on record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from sweeps_of_rules import by_how, signal_when, words_for

from claq_exp.cli import main
from claq_exp.compose.experiment import compose_all
from claq_exp.run_folder import run_state
from claq_exp.run_folder.jobs import read_jobs
from claq_exp.sweep.grid import check_grid


@pytest.fixture
def outputs(tmp_path) -> Path:
    return tmp_path / "outputs" / "default"


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "marks"


@pytest.fixture(autouse=True)
def rules_for_new_processes(monkeypatch):
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))


@pytest.mark.case(80)
@pytest.mark.parametrize("launcher", ["processes", "slurm_local"])
def test_two_of_four_jobs_finish_beside_one_that_fails_and_one_that_is_killed(
    launcher, tiny_run, outputs, place, capfd
):
    words = words_for(tiny_run, place, "+precision.how=nothing,fail,kill,look")
    words.remove("threads=1")
    assert main(["-m", *words, f"hydra/launcher={launcher}"]) == 1
    jobs = by_how(outputs)
    assert {how: job.state.name for how, job in jobs.items()} == {
        "nothing": "finished",
        "fail": "failed",
        "kill": "killed",
        "look": "finished",
    }
    assert "no such luck" in jobs["fail"].state.reason
    assert "SIGKILL" in jobs["kill"].state.reason
    assert (outputs / jobs["look"].folder / "results.json").is_file()
    error = capfd.readouterr().err
    assert len([line for line in error.splitlines() if line.startswith("claq-exp: job")]) == 2
    results = json.loads((outputs / jobs["look"].folder / "results.json").read_text())
    threads = max(1, len(os.sched_getaffinity(0)) // 2) if launcher == "processes" else 1
    assert results["run"]["device"].startswith(f"CPU, {threads} threads of ")


@pytest.mark.case(86)
@pytest.mark.case(3)
@pytest.mark.usefixtures("heeds_interruptions")
def test_jobs_side_by_side_finish_what_is_at_hand_when_a_person_ends_the_sweep(
    tiny_run, outputs, place, capfd
):
    grid = ["+precision.how=sleep,nothing", "seed=1,2", "+precision.once=true"]
    words = words_for(tiny_run, place, *grid, "hydra/launcher=processes")
    words.remove("threads=1")
    thread = signal_when(place / "sleep", signal.SIGINT)
    assert main(["-m", *words]) == 75
    thread.join()
    names = {run_state(path.parent).name for path in outputs.glob("*/state.json")}
    assert "interrupted" in names
    assert names <= {"interrupted", "finished"}
    assert {job.state.name for job in read_jobs(outputs)} <= {"interrupted", "finished"}
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    assert "the launcher failed" not in captured.err
    assert main(["-m", *words]) == 0


def test_a_search_goes_on_after_a_failed_job_and_repeats_itself(tiny_run, outputs, place, capfd):
    words = [word for word in words_for(tiny_run, place) if not word.startswith("~evaluation")]
    words += ["hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_trials=4"]
    words += ["+precision.how=choice(nothing,fail)", "calibration.windows=choice(4,5)"]
    words = ["-m", *words, "hydra.sweeper.direction=minimize"]
    assert main(words) == 1
    jobs = by_how(outputs)
    assert {how: job.state.name for how, job in jobs.items()} == {
        "nothing": "finished",
        "fail": "failed",
    }
    assert "no such luck" in jobs["fail"].state.reason
    assert 1 < jobs["nothing"].objective < 1e9
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    assert "[I " not in captured.err
    tried = {job.overrides for job in read_jobs(outputs)}
    assert main(words) == 1
    assert {job.overrides for job in read_jobs(outputs)} == tried
    found = [job.found for job in read_jobs(outputs) if job.state.name == "finished"]
    assert all(found)


def test_a_search_that_tries_a_job_twice_is_complete(tiny_run, outputs, capfd):
    words = ["-m", *tiny_run, "experiment=rtn_4bit", "threads=1", "hydra/sweeper=optuna"]
    words += ["hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_trials=3", "seed=choice(1,2)"]
    assert main([*words, "hydra.sweeper.n_jobs=1"]) == 0
    assert 1 <= len(read_jobs(outputs)) <= 2
    assert "3 of" not in capfd.readouterr().out


def test_a_search_without_a_perplexity_is_refused(tiny_run, capfd):
    words = ["-m", *tiny_run, "hydra/sweeper=optuna", "~evaluation.corpora.wikipedia"]
    assert main([*words, "seed=choice(1,2)"]) == 2
    assert "a search needs a perplexity" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ("precision.target_bits=choice(2.5,9)", "precision.target_bits=9"),
        ("reservation.ratio=interval(0.001,2)", "reservation.ratio is 2"),
    ],
)
def test_every_value_of_a_search_is_checked_before_it_starts(values, fragment, tiny_run, capfd):
    words = ["-m", *tiny_run, "hydra/sweeper=optuna", "seed=choice(1,2)"]
    assert main([*words, values]) == 2
    assert fragment in capfd.readouterr().err


@pytest.mark.case(87)
@pytest.mark.parametrize("engine", ["launcher: joblib", "sweeper: optuna"])
def test_an_engine_inside_an_experiment_that_is_swept_is_refused(engine, tmp_path, capfd):
    group, _, option = engine.partition(": ")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/inside.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - override /hydra/{group}: {option}\nseed: 7\n"
    )
    words = ["hydra.searchpath=[file://" + str(tmp_path) + "]", "experiment=inside,rtn_4bit"]
    assert main(["-m", *words]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "experiment=inside" in lines[0]
    assert f"hydra/{group}={option}" in lines[0]
    assert check_grid([words[0], "experiment=inside", "seed=choice(1,2)"]).base.seed == 1


@pytest.mark.case(78)
def test_what_a_sweep_lists_beats_experiment_and_defaults_and_experiments_beat_defaults():
    grid = check_grid(["sweep=ablation_components", "experiment=kmeans_4bit,ap_2.1", "seed=3,4"])
    assert (grid.jobs, grid.base.name) == (4, "ablation_components")
    assert grid.base.precision["bits"] == 4
    assert grid.base.seed == 3
    composed = compose_all(["sweep=bit_widths", "name=mine"])
    assert composed.name == "mine"
    assert compose_all(["sweep=bit_widths"]).name == "bit_widths"


@pytest.mark.case(15, 83)
def test_three_sweeps_started_together_keep_all_their_files(tiny_run, outputs, tmp_path):
    words = ["experiment=rtn_4bit", "threads=1", "~evaluation.corpora.wikipedia", "seed=1,2"]
    command = [sys.executable, "-m", "claq_exp", "-m", *tiny_run, *words]
    sweeps = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [sweep.wait(timeout=500) for sweep in sweeps] == [0, 0, 0]
    own = list((tmp_path / "outputs/.multirun").iterdir())
    assert len(own) == 3
    for folder in own:
        assert [job.state.name for job in read_jobs(folder)] == ["finished", "finished"]
        assert OmegaConf.load(folder / "multirun.yaml").hydra.sweep.dir == str(folder)
    for number in range(2):
        found = [read_jobs(folder)[number].found for folder in own]
        assert sorted(found) == [False, True, True]
    results = [json.loads(path.read_text()) for path in outputs.glob("*/results.json")]
    assert sorted(row["config"]["seed"] for row in results) == [1, 2]
