"""Progress goes to the terminal, or as plain lines to a file; the noise of others to a log."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from claq_exp.tracking import progress
from claq_exp.tracking.progress import RunProgress, noise_to

ESTIMATES = {"load": 10.0, "quantize": 70.0, "export": 20.0}


def shown(*, terminal: bool) -> tuple[RunProgress, io.StringIO]:
    stream = io.StringIO()
    return RunProgress(ESTIMATES, Console(file=stream, force_terminal=terminal, width=100)), stream


def test_without_a_terminal_each_stage_is_one_plain_line():
    bar, stream = shown(terminal=False)
    with bar:
        bar.stage("load")
        bar.stage("quantize")
        for _ in range(20):
            bar.advance(0.05, "block 3")
        bar.stage("export")
    lines = stream.getvalue().split("\n")
    assert lines[:3] == ["[  0 %] load", "[ 10 %] quantize", "[ 80 %] export"]
    assert not "".join(lines[3:])
    assert "\x1b" not in stream.getvalue()


def test_a_long_stage_says_now_and_then_where_it_is(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    bar, stream = shown(terminal=False)
    bar.stage("quantize")
    for block in range(8):
        bar.advance(0.125, f"block {block}")
    lines = stream.getvalue().splitlines()
    assert lines == ["[  0 %] quantize", "[ 35 %] quantize block 3", "[ 70 %] quantize block 7"]


def test_a_stage_never_counts_more_than_its_estimate():
    bar, stream = shown(terminal=False)
    bar.stage("load")
    for _ in range(5):
        bar.advance(0.7)
    bar.stage("quantize")
    bar.stage("unplanned")
    bar.advance(0.5)
    bar.stage("export")
    assert stream.getvalue().splitlines() == [
        "[  0 %] load",
        "[ 10 %] quantize",
        "[ 80 %] unplanned",
        "[ 80 %] export",
    ]


def test_on_a_terminal_there_is_a_bar_with_the_stage():
    bar, stream = shown(terminal=True)
    with bar:
        bar.stage("load")
        bar.stage("quantize")
        bar.advance(0.5, "block 3")
    text = stream.getvalue()
    assert "\x1b[" in text
    assert "quantize block 3" in text
    assert "80 %" in text


def test_noise_of_this_process_and_of_its_children_goes_to_the_file(tmp_path):
    code = (
        "import os, subprocess, sys; from pathlib import Path\n"
        "from claq_exp.tracking.progress import noise_to\n"
        "print('before')\n"
        "with noise_to(Path('noise.log')):\n"
        "    print('from python')\n"
        "    print('to error', file=sys.stderr)\n"
        "    os.write(1, b'from a library\\n')\n"
        "    subprocess.run('echo from a child; echo its error >&2', shell=True)\n"
        "print('after')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert (result.stdout, result.stderr) == ("before\nafter\n", "")
    assert sorted((tmp_path / "noise.log").read_text().splitlines()) == [
        "from a child",
        "from a library",
        "from python",
        "its error",
        "to error",
    ]


def test_noise_is_appended_and_ends_with_an_error(tmp_path, capfd):
    log = tmp_path / "noise.log"
    log.write_text("earlier\n")
    with pytest.raises(RuntimeError), noise_to(log):
        os.write(1, b"inside\n")
        raise RuntimeError
    os.write(1, b"after\n")
    assert log.read_text() == "earlier\ninside\n"
    assert capfd.readouterr().out == "after\n"


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
@pytest.mark.parametrize("what", ["noise", "progress"])
def test_no_file_stays_open(what, tmp_path, capfd):
    before = open_files()
    for _ in range(5):
        if what == "noise":
            with noise_to(tmp_path / "noise.log"):
                pass
        else:
            with RunProgress(ESTIMATES) as bar:
                bar.stage("load")
            del bar
    assert open_files() == before


def test_progress_stays_on_the_terminal_inside_the_noise(tmp_path, capfd):
    with RunProgress(ESTIMATES) as bar, noise_to(tmp_path / "noise.log"):
        bar.stage("load")
        os.write(2, b"noise\n")
    assert "[  0 %] load" in capfd.readouterr().err
    assert (tmp_path / "noise.log").read_text() == "noise\n"
