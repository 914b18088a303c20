"""`seeds=0,1,2` is one word for several runs, and tables show their mean and spread."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claq_exp.cli import main
from claq_exp.compose.seeds import first_seed, spread_seeds
from claq_exp.compose.words import read_words
from claq_exp.errors import ConfigError
from claq_exp.reporting.collect import collect
from claq_exp.run_folder.jobs import read_jobs
from claq_exp.sweep.grid import check_grid
from claq_exp.sweep.job import Sweep
from claq_exp.sweep.work import run_here


@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6, unique=True))
def test_the_seeds_that_are_listed_are_run(seeds):
    word = f"seeds={','.join(map(str, seeds))}"
    spread, found = spread_seeds(["name=x", word, "budget.bits=3"])
    assert found == tuple(seeds)
    assert spread == ["name=x", word.replace("seeds", "seed"), "budget.bits=3"]
    assert first_seed([word, "-m"]) == ([f"seed={seeds[0]}", "-m"], found)


def test_a_range_is_a_list_and_no_word_is_no_seed():
    assert spread_seeds(["seeds=range(2,5)"]) == (["seed=2,3,4"], (2, 3, 4))
    assert spread_seeds(["seed=3"]) == first_seed(["seed=3"]) == (["seed=3"], ())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seeds=a"], "names no seeds"),
        (["seeds="], "names no seeds"),
        (["seeds=0,,1"], "names no seeds"),
        (["seeds=-1,0"], "names no seeds"),
        (["seeds=0.5"], "names no seeds"),
        (["run", "seeds"], "names no seeds"),
        (["seeds=[0,1]"], "names no seeds"),
        (["seeds=range(3,3)"], "names no seed; nothing would be run"),
        (["seeds=0,1,0"], "has the seed 0 twice"),
        (["seeds=0,00"], "has the seed 0 twice"),
        (["+seeds=0,1"], "write it as seeds=0,1,2"),
        (["seeds=0,1", "seeds=2"], "do not go together"),
        (["seeds=0,1", "seed=2"], "seeds=0,1 and seed=2 do not go together"),
        (["seeds=0,1", "++seed=2,3", "-m"], "do not go together"),
        (["seeds=0,99999999999"], "seed is 99999999999"),
        (["seeds=0,1", "calibration.seed=3"], "would run one draw several times"),
        (["seeds=0,1", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2"], "search with one seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_seeds_are_refused_in_one_line(words, said, capfd):
    if any("optuna" in word for word in words):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert main(words) == 2
    (line,) = [text for text in capfd.readouterr().err.splitlines() if text.strip()]
    assert said in line


def test_one_seed_is_a_plain_run_and_several_are_a_sweep():
    one, three = read_words(["seeds=4"]), read_words(["seeds=0,1,2", "experiment=a"])
    assert (one.overrides, one.multirun) == (["seed=4"], False)
    assert (three.overrides, three.multirun) == (["seed=0,1,2", "experiment=a"], True)


def test_every_job_of_a_sweep_is_run_with_each_seed():
    words = read_words(["sweep=seeds", "seeds=7,8", "experiment=rtn_4bit,rtn_3bit"])
    grid = check_grid(words.overrides)
    assert grid.jobs == 4
    assert [config.seed for config in grid.configs] == [7, 8] * 2
    assert [config.calibration.seed for config in grid.configs] == [7, 8] * 2


@pytest.mark.parametrize("command", ["evaluate", "bench runtime"])
def test_commands_about_one_checkpoint_take_one_seed(command, capfd):
    assert main([*command.split(), "checkpoint=x", "seeds=0,1"]) == 2
    assert "takes one experiment; give it one seed" in capfd.readouterr().err


def test_plan_shows_one_of_the_runs_and_says_how_many_there_are(tiny_run, capfd):
    assert main(["plan", *tiny_run, "seeds=3,4"]) == 0
    assert "2 runs, one for each seed; the table is of one of them" in capfd.readouterr().out
    assert main(["plan", *tiny_run, "seeds=3"]) == 0
    assert "2 runs" not in capfd.readouterr().out


def test_fetch_brings_what_all_seeds_read(tiny_run, capfd):
    assert main(["fetch", *tiny_run, "seeds=3,4"]) == 0
    assert "calibration" in capfd.readouterr().out


def test_printing_takes_one_seed(capfd):
    assert main(["--cfg", "job", "--package", "seed", "seeds=3"]) == 0
    assert main(["--cfg", "job", "seeds=3,4"]) == 2
    assert "'seeds=3,4' lists several values" in capfd.readouterr().err


@pytest.fixture(scope="module")
def swept(tiny_model, text_file, tmp_path_factory) -> tuple[list[str], Path]:
    """The words of a run of two recipes with two seeds, which is done, and its folder."""
    from conftest import tiny_words

    place = tmp_path_factory.mktemp("seeds")
    words = [*tiny_words(tiny_model, text_file), f"outputs={place}", "name=two", "threads=1"]
    words += ["calibration.windows=2", "evaluation.kl_windows=1", "embedding=none"]
    words += ["experiment=kmeans_4bit,kmeans_3bit", "seeds=0,1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("claq_exp.sweep.run.Sweep", in_this_process)
        assert main(words) == 0
    return words, place / "two"


def in_this_process(command: str, folder: Path, run_job: object, seeds: bool) -> Sweep:
    """A sweep whose jobs have no process of their own, which would take seconds to start."""
    return Sweep(command, folder, lambda order, share, _: run_here(order, share), seeds)


@pytest.fixture(autouse=True)
def here(monkeypatch) -> None:
    monkeypatch.setattr("claq_exp.sweep.run.Sweep", in_this_process)


def test_the_jobs_are_runs_as_any_others_and_are_found_again(swept, capfd, monkeypatch):
    words, folder = swept
    monkeypatch.setenv("COLUMNS", "160")
    results = [json.loads(path.read_text()) for path in folder.rglob("results.json")]
    assert sorted(row["config"]["seed"] for row in results) == [0, 0, 1, 1]
    assert all(job.seeds for job in read_jobs(folder))
    plain = [word for word in words if not word.startswith(("seeds=", "experiment="))]
    assert main([*plain, "experiment=kmeans_4bit", "seeds=1"]) == 0
    assert "finished before" in capfd.readouterr().out
    assert main(words) == 0
    output = capfd.readouterr().out
    assert "4 of 4 done, 4 of them found" in output
    assert len(re.findall(r"\d ± \d", output)) >= 2  # the last table, of means
    assert "one row; --by seed shows each" in " ".join(output.split())


def test_a_report_merges_them_by_itself(swept, capfd, monkeypatch):
    _, folder = swept
    monkeypatch.setenv("COLUMNS", "200")
    assert sum(run.together for run in collect([folder]).runs) == 4
    assert main(["report", str(folder)]) == 0
    output = capfd.readouterr().out
    assert len(re.findall(r"│ +2 │", output)) == 2  # n
    for name, mark in {"md": "±", "csv": " std,", "tex": r"$\pm$", "html": "±"}.items():
        assert mark in (folder / f"report.{name}").read_text(), name
    assert main(["report", str(folder), "--by", "seed"]) == 0
    assert "±" not in capfd.readouterr().out


def test_jobs_that_were_run_one_by_one_later_are_rows_again(swept, capfd):
    words, folder = swept
    plain = [word.replace("seeds=", "seed=") for word in words]
    assert main([*plain, "-m"]) == 0
    assert not any(run.together for run in collect([folder]).runs)
    assert main(words) == 0
    assert all(run.together for run in collect([folder]).runs)


def test_words_that_cannot_be_read_name_what_to_write():
    with pytest.raises(ConfigError, match=r"seeds=range\(0,8\)"):
        spread_seeds(["seeds=x"])
