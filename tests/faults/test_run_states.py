"""A run folder tells how its run stands: running, finished, failed, interrupted or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from claq_exp.errors import SourceError
from claq_exp.run_folder import RunFolder, RunState, run_state


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run", "0" * 64)


def test_a_folder_without_a_run_has_no_state(tmp_path):
    assert run_state(tmp_path) is None
    assert run_state(tmp_path / "nothing") is None


def test_a_run_is_running_while_it_is_held_and_finished_when_its_results_are_there(folder):
    with folder.locked(), folder.recorded():
        assert run_state(folder.path) == RunState("running")
        folder.write_results({"status": "finished"})
    assert run_state(folder.path) == RunState("finished")
    (folder.path / "state.json").unlink()
    assert run_state(folder.path) == RunState("finished")


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (SourceError("no luck\nat all"), RunState("failed", "no luck")),
        (RuntimeError(), RunState("failed", "RuntimeError()")),
        (KeyboardInterrupt(), RunState("interrupted")),
    ],
    ids=["error", "bug", "person"],
)
def test_how_a_run_ended_is_kept_with_its_reason(error, state, folder):
    with pytest.raises(type(error)), folder.locked(), folder.recorded():
        raise error
    assert run_state(folder.path) == state


def test_a_pipe_that_is_closed_is_told_as_the_reason(tmp_path):
    folder = RunFolder(tmp_path / "run", "0" * 64)

    def print_line() -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 - as rich does

    with pytest.raises(SystemExit), folder.locked(), folder.recorded():
        print_line()
    state = run_state(folder.path)
    assert (state.name, state.reason) == ("failed", "the program that read its output has ended")


def test_a_killed_run_is_told_from_one_that_runs_or_raised(folder, tmp_path):
    script = (
        "import time; from pathlib import Path; from claq_exp.run_folder import RunFolder\n"
        f"folder = RunFolder(Path({str(folder.path)!r}), '0' * 64)\n"
        "with folder.locked(), folder.recorded():\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        assert run_state(folder.path) == RunState("running")
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    finally:
        child.kill()
    deadline = time.monotonic() + 10
    while run_state(folder.path).name == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    state = run_state(folder.path)
    assert state.name == "killed"
    assert f"process {child.pid} on " in state.reason


def test_a_damaged_note_counts_as_none(folder):
    folder.path.mkdir()
    (folder.path / "state.json").write_text("{")
    assert run_state(folder.path) is None
