"""A grid is checked as a whole before it starts; once started, one failed job stops no other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable

import pytest

from claq_exp.cli import main
from claq_exp.errors import ClaqError
from claq_exp.run import job
from claq_exp.run_folder import RunState
from claq_exp.run_folder.jobs import read_jobs
from claq_exp.sweep.grid import check_grid
from claq_exp.sweep.run import run_sweep
from claq_exp.sweep.work import Done, OnShare, Order, run_here


def here(order: Order, on_share: OnShare, check: Callable[[], None]) -> Done:
    return run_here(order, on_share)


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


@pytest.fixture
def run(tiny_run):
    words = ["experiment=rtn_4bit", "threads=1", "~evaluation.corpora.wikipedia"]
    return lambda *more: main([*tiny_run, *words, *more])


@pytest.mark.case(74)
@pytest.mark.parametrize(
    "grid",
    [
        ["-m", "precision.bits=3,4,9"],
        ["-m", "seed=1,2", "solver=nearest,nothing"],
        ["-m", "precision.bits=choice(3,9)"],
        ["-m", "precision.bits=range(7,10)"],
        ["-m", "seed=1,2", "foo=1,2"],
        ["sweep=bit_widths", "codebook=uniform"],
    ],
    ids=" ".join,
)
def test_a_bad_value_in_any_job_is_refused_before_the_first_one_starts(grid, run, outputs, capfd):
    assert run(*grid) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("claq-exp: ")
    assert not outputs.exists()


def test_a_bad_value_that_replaces_a_sweeps_own_is_refused(tiny_run, outputs, capfd):
    assert main([*tiny_run, "sweep=bit_widths", "precision.target_bits=9"]) == 2
    assert "precision.target_bits=9" in capfd.readouterr().err
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("grid", "jobs"),
    [
        (["seed=1,2", "precision.target_bits=2.1,2.5,3"], 6),
        (["seed=range(1,5)"], 4),
        (["seed=1,2,1"], 2),
        (["seed=choice(1,2,3)", "precision=fixed"], 3),
        (["sweep=bit_widths", "precision.target_bits=2.5"], 2),
        (["sweep=bit_widths", "reservation=none,fixed", "precision.target_bits=2.5,3"], 4),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_the_number_of_jobs_is_that_of_the_combinations(grid, jobs):
    assert check_grid(grid).jobs == jobs


@pytest.mark.case(80)
def test_one_failing_job_of_three_stops_no_other_and_is_named(run, outputs, capfd):
    assert run("-m", "calibration.windows=2,5000,3") == 1
    finished = [json.loads(path.read_text()) for path in outputs.rglob("results.json")]
    assert sorted(row["config"]["calibration"]["windows"] for row in finished) == [2, 3]
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("claq-exp: ")]
    assert "calibration: the text has" in line
    assert "5000" in line


def test_every_failing_job_is_told_from_the_others(run, outputs, capfd):
    assert run("-m", "seed=7,8", "calibration.windows=5000") == 1
    lines = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("claq-exp: job")
    ]
    assert len(lines) == 2
    assert "seed=7" in lines[0]
    assert "seed=8" in lines[1]


@pytest.mark.case(80)
def test_an_error_nobody_expected_stops_no_other_job_either(tiny_run, outputs, monkeypatch, capfd):
    build = job.build_results
    calls = []

    def fail_first(**options):
        calls.append(options)
        if len(calls) == 1:
            raise RuntimeError("the builder is broken")
        return build(**options)

    monkeypatch.setattr(job, "build_results", fail_first)
    words = [*tiny_run, "experiment=rtn_4bit", "threads=1", "~evaluation.corpora.wikipedia"]
    assert run_sweep([*words, "seed=7,8"], "as typed", run_job=here) == 1
    finished = [json.loads(path.read_text()) for path in outputs.rglob("results.json")]
    assert [row["config"]["seed"] for row in finished] == [8]
    failed, finished = read_jobs(outputs / "default")
    assert failed.state == RunState("failed", "the builder is broken")
    assert finished.state == RunState("finished")
    assert "failed (seed=7): the builder is broken" in capfd.readouterr().err


@pytest.mark.case(83)
def test_a_value_that_is_listed_twice_is_one_job(run, outputs, capfd):
    assert run("-m", "seed=7,7") == 0
    (job,) = read_jobs(outputs / "default")
    assert job.state == RunState("finished")
    assert len(list(outputs.rglob("results.json"))) == 1
    assert "1 of 1 done" in capfd.readouterr().out


def test_a_grid_makes_no_folder_called_tilde(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run("-m", "seed=7", "outputs='~/runs'") == 0
    assert list((tmp_path / "home" / "runs").rglob("results.json"))
    assert not (tmp_path / "~").exists()


@pytest.mark.case(138)
def test_jobs_with_names_of_their_own_are_all_reported(tiny_run, outputs, tmp_path, capsys):
    words = [*tiny_run, "experiment=rtn_4bit", "threads=1", "~evaluation.corpora.wikipedia"]
    words = [word for word in words if not word.startswith("outputs=")]
    place = tmp_path / "my outputs"
    words += [f"outputs='{place}'", "name=x${seed}", "seed=7,8"]
    assert run_sweep(words, "as typed", run_job=here) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    _, _, command = last.partition("For tables and plots: claq-exp ")
    assert shlex.split(command) == ["report", f"{place}/x7", f"{place}/x8"]
    assert [len(read_jobs(place / name)) for name in ("x7", "x8")] == [1, 1]


@pytest.mark.case(139)
def test_an_environment_variable_of_a_sweep_reaches_its_jobs(tiny_run, monkeypatch):
    seen = []

    def look(order, on_share, check):
        seen.append(order.environment.get("MINE"))
        raise ClaqError("that is all")

    monkeypatch.delenv("MINE", raising=False)
    words = [*tiny_run, "+hydra.job.env_set.MINE=abc", "seed=7"]
    assert run_sweep(words, "as typed", run_job=look) == 1
    assert seen == ["abc"]
