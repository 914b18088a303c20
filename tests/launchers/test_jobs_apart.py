"""Jobs run in processes of their own: what one does to its process stays its own affair."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from sweeps_of_rules import by_how, signal_when, words_for

from claq_exp.cli import main
from claq_exp.run_folder import RunState, run_state


@pytest.fixture
def outputs(tmp_path) -> Path:
    return tmp_path / "outputs" / "default"


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "marks"


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.case(80, 81, 82)
def test_killed_failed_and_aborted_jobs_stop_no_other_and_run_again_alone(
    tiny_run, outputs, place, capfd
):
    grid = "+precision.how=nothing,kill,fail,abort,leave"
    words = ["-m", *words_for(tiny_run, place, "+precision.once=true", grid)]
    assert main(words) == 1
    jobs = by_how(outputs)
    assert {how: job.state.name for how, job in jobs.items()} == {
        "nothing": "finished",
        "kill": "killed",
        "fail": "failed",
        "abort": "killed",
        "leave": "failed",
    }
    assert "SIGKILL" in jobs["kill"].state.reason
    assert "SIGABRT" in jobs["abort"].state.reason
    assert jobs["fail"].state.reason.startswith("RuntimeError: no such luck; traceback in ")
    log = Path(jobs["fail"].state.reason.rpartition(" ")[2])
    assert "_fail" in log.read_text()
    assert "exit code 7" in jobs["leave"].state.reason
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("claq-exp: job")]
    assert len(lines) == 4
    assert "1 of 5 done, 2 failed, 2 killed" in captured.out
    assert "To run what is missing: claq-exp -m model=hf" in captured.out

    first = outputs / jobs["nothing"].folder
    before = (first / "results.json").stat().st_mtime_ns
    assert main(words) == 0
    again = by_how(outputs)
    assert {how: (job.state.name, job.found) for how, job in again.items()} == {
        "nothing": ("finished", True),
        "kill": ("finished", False),
        "fail": ("finished", False),
        "abort": ("finished", False),
        "leave": ("finished", False),
    }
    assert (first / "results.json").stat().st_mtime_ns == before
    assert "5 of 5 done, 1 of them found" in capfd.readouterr().out


@pytest.mark.case(38, 84)
def test_a_job_does_not_see_what_an_earlier_one_did_to_its_process(tiny_run, outputs, place):
    words = ["-m", *words_for(tiny_run, place, "seed=5")]
    assert main([*words, "name=alone", "+precision.how=look"]) == 0
    alone = json.loads((place / "seen.json").read_text())
    assert main([*words, "+precision.how=spoil,look"]) == 0
    seen = json.loads((place / "seen.json").read_text())
    assert seen == alone
    assert not seen["tf32"]
    assert seen["precision"] == "highest"
    assert seen["spoiled"] is None
    assert seen["threads"] == 1
    assert os.environ.get("SPOILED") is None
    peaks = {
        how: json.loads((outputs / job.folder / "results.json").read_text())["peak_memory_bytes"]
        for how, job in by_how(outputs).items()
    }
    assert peaks["look"] < peaks["spoil"] - (500 << 20)


@pytest.mark.usefixtures("heeds_interruptions")
def test_an_interruption_that_a_launcher_makes_an_error_of_stays_one(
    tiny_run, outputs, capfd, monkeypatch
):
    """Hydra does so with one that meets it while it composes a job."""

    def launch(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("composition")

    monkeypatch.setattr("claq_exp.sweep.run.with_hydra", launch)
    assert main(["-m", *tiny_run, "seed=0,1"]) == 75
    assert "launcher failed" not in capfd.readouterr().err


@pytest.mark.case(3)
@pytest.mark.usefixtures("heeds_interruptions")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_child_and_sweep_and_the_same_command_goes_on(
    number, tiny_run, outputs, place, capfd
):
    words = ["-m", *words_for(tiny_run, place, "+precision.how=nothing,sleep,look")]
    words.append("+precision.once=true")
    thread = signal_when(place / "sleep", number)
    assert main(words) == 75
    thread.join()
    assert gone(int((place / "sleep").read_text()))
    jobs = by_how(outputs)
    assert jobs["nothing"].state == RunState("finished")
    assert jobs["sleep"].state == RunState("interrupted")
    assert "look" not in jobs
    states = {run_state(path.parent).name for path in outputs.glob("*/state.json")}
    assert states == {"finished", "interrupted"}
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.splitlines()[-1].startswith(
        "claq-exp: interrupted; the same command goes on where this one stopped: claq-exp -m"
    )
    assert "1 of 3 done, 1 interrupted, 0 running, 1 waiting" in captured.out

    assert main(words) == 0
    assert {how: job.found for how, job in by_how(outputs).items()} == {
        "nothing": True,
        "sleep": False,
        "look": False,
    }


def test_no_child_outlives_a_killed_sweep(tiny_run, outputs, place):
    words = words_for(tiny_run, place, "+precision.how=sleep,nothing")
    path = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    sweep = subprocess.Popen(
        [sys.executable, "-m", "claq_exp", "-m", *words],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while not (place / "sleep").exists() and time.monotonic() < deadline:
            assert sweep.poll() is None
            time.sleep(0.1)
        time.sleep(0.2)
        child = int((place / "sleep").read_text())
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
    finally:
        sweep.kill()
    assert gone(child)
    job = by_how(outputs)["sleep"]
    assert job.state.name == "killed"
    assert f"process {sweep.pid} on " in job.state.reason


@pytest.mark.case(85)
def test_a_job_sees_the_one_gpu_that_it_holds(tiny_run, place, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("claq_exp.sweep.share.torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("claq_exp.sweep.share._lock_folder", lambda: tmp_path / "gpus")
    held = filelock.FileLock(tmp_path / "gpus" / "gpu-0.lock")
    (tmp_path / "gpus").mkdir()
    with held:
        assert main(["-m", *words_for(tiny_run, place, "+precision.how=look", "device=auto")]) == 0
    assert json.loads((place / "seen.json").read_text())["devices"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
