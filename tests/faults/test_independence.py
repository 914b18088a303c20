"""What a run can do without: libraries beside the point, a home, a cache, a good terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb

import claq_exp
from claq_exp.cli import main
from claq_exp.tracking import wandb as mirror
from claq_exp.tracking.limits import TrackingConfig
from claq_exp.tracking.wandb import WandbTracker, within

PROGRAM = "import json, sys; from claq_exp.cli import main; sys.exit(main(json.loads(sys.argv[1])))"


@pytest.fixture
def words(tiny_run) -> list[str]:
    kept = [word for word in tiny_run if not word.startswith(("outputs=", "tracking="))]
    return [*kept, "experiment=rtn_4bit", "threads=1"]


def missing(folder: Path, *packages: str) -> str:
    """Make packages fail to import; return the PYTHONPATH that does it."""
    folder.mkdir()
    for package in packages:
        (folder / f"{package}.py").write_text(f"raise ImportError('{package} is broken')\n")
    return os.pathsep.join([str(folder), str(Path(claq_exp.__file__).parents[1])])


def start(command: list[str], place: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line with nothing in the environment but what is given."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(command)],
        env={"PATH": "", "OMP_NUM_THREADS": "1", **environment},
        cwd=place,
        capture_output=True,
        check=False,
        timeout=300,
    )


@pytest.mark.case(79, 89, 94, 98)
def test_a_run_needs_no_home_cache_locale_display_git_wandb_or_lm_eval(words, tmp_path):
    place = tmp_path / "a place, héron 数"
    place.mkdir()
    environment = {
        "PYTHONPATH": missing(tmp_path / "broken", "wandb", "lm_eval"),
        "HOME": os.devnull,
        **dict.fromkeys(("LANG", "LC_ALL"), "C"),
        **dict.fromkeys(("PYTHONUTF8", "PYTHONCOERCECLOCALE"), "0"),
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "30",
        "DISPLAY": "",
        "MPLBACKEND": "TkAgg",
    }
    done = start([*words, "tracking=wandb"], place, **environment)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    output = done.stdout.decode("ascii")
    assert "Note: Weights & Biases failed and was left out: wandb is broken" in output
    assert all(len(line) <= 30 for line in output.splitlines() if line[:1] in "|+")
    (results,) = place.glob("outputs/default/*/results.json")
    assert json.loads(results.read_text())["run"]["git"] is None
    assert (results.parent / "layers.png").stat().st_size > 1000
    done = start(["report", "outputs"], place, **environment)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (place / "outputs" / "report.md").is_file()
    assert list(place.glob("outputs/pictures/*.png"))
    assert sorted(path.name for path in place.iterdir()) == ["outputs"]


@pytest.mark.case(89)
def test_tasks_without_lm_eval_are_refused_before_any_work(words, tmp_path, text_file):
    words = [*words, "tracking=none", "+evaluation.zero_shot.piqa.rows=5"]
    done = start(words, tmp_path, PYTHONPATH=missing(tmp_path / "broken", "lm_eval"))
    error = done.stderr.decode().splitlines()
    assert done.returncode == 2, error
    assert error[-1].startswith("claq-exp: ")
    assert "lm_eval" in error[-1]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.case(19, 79)
@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_cache_that_cannot_be_written_keeps_nothing_and_stops_nothing(
    place, words, tmp_path, monkeypatch
):
    (tmp_path / "taken").write_text("mine")
    cache = tmp_path / "taken" if place == "a file" else tmp_path / "taken" / "cache"
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(cache))
    assert main([*words, "tracking=none", f"outputs={tmp_path / 'outputs'}"]) == 0
    assert list(tmp_path.glob("outputs/default/*/results.json"))
    assert (tmp_path / "taken").read_text() == "mine"


# Weights & Biases


class HangingRun:
    """A W&B run that never finishes."""

    def __init__(self) -> None:
        self.summary: dict = {}
        self.ended = threading.Event()

    def log(self, metrics: dict) -> None:
        pass

    def finish(self, exit_code: int) -> None:
        self.ended.wait(60)


@pytest.mark.case(94)
def test_a_wandb_that_never_finishes_is_left_alone(words, tmp_path, monkeypatch, capfd):
    run = HangingRun()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    monkeypatch.setattr(mirror, "FINISH_SECONDS", 0.3)
    try:
        assert main([*words, "tracking=wandb", f"outputs={tmp_path / 'outputs'}"]) == 0
    finally:
        run.ended.set()
    assert "failed and was left out: it was not done after 0.3 s" in capfd.readouterr().out
    (results,) = tmp_path.glob("outputs/default/*/results.json")
    assert json.loads(results.read_text())["status"] == "finished"


def test_what_is_limited_in_time_raises_what_it_raises():
    with pytest.raises(KeyError, match="own"):
        within(5, lambda: {}["own"])
    seen = []
    within(5, lambda: seen.append(1))
    assert seen == [1]


@pytest.mark.case(94)
def test_wandb_is_told_to_give_up_in_time(tmp_path, monkeypatch):
    options = {}
    monkeypatch.setattr(wandb, "init", lambda **given: options.update(given) or HangingRun())
    WandbTracker(TrackingConfig("wandb", "online"), tmp_path, "name", {})
    assert options["settings"].init_timeout == 30
    monkeypatch.setitem(mirror.LIMITS, "a_setting_of_another_release", 1)
    assert mirror.limits().init_timeout == 30


@pytest.mark.case(94)
@pytest.mark.parametrize("login", ["absent", "given, and the server unreachable"])
def test_wandb_online_without_login_or_server_fails_in_time(login, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if login != "absent":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(mirror.LIMITS, "init_timeout", 1)
    started = time.monotonic()
    tracker = WandbTracker(TrackingConfig("wandb", "online"), tmp_path, "name", {})
    tracker.event("perplexity", {"dataset": "words", "model": "original", "value": 7.5})
    tracker.finish(None)
    assert time.monotonic() - started < 30
    assert tracker.failure is not None
    assert "\n" not in tracker.failure
    expected = "API key" if login == "absent" else "Timed out"
    assert expected in tracker.failure
