"""The soak benchmark kills a sweep, repeats its command, and finds the same table and bytes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.case(1, 82)
def test_a_killed_sweep_ends_with_the_table_of_the_quiet_one():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "soak.py"), "--quick", "--seed", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "seed 4"
    assert sum(line.rstrip(" │").endswith("yes") for line in lines) == 2
    assert lines[-1].endswith((" on a sweep", " on a job"))


def test_a_run_that_differs_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("soak", BENCHMARKS / "soak.py")
    soak = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", soak)
    spec.loader.exec_module(soak)
    runs = []
    for place, content in (("one", b"1"), ("two", b"2")):
        folder = tmp_path / place / "run-12345678"
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / "model.safetensors").write_bytes(content)
        (folder / "events.jsonl").write_text("")
        runs.append(soak.Run(folder, None, {}, sample_results()))
    quiet, other = ({"run": run} for run in runs)
    assert soak.compare(quiet, [quiet, quiet])[1]
    assert not soak.compare(quiet, [quiet, other])[1]
    assert not soak.compare(quiet, [{}])[1]


def sample_results() -> dict:
    bits = {"linear": 3.0, "nominal": 3.0, "model": 4.0}
    return {
        "run": {},
        "bits": bits,
        "size": {"checkpoint_bytes": 10, "original_bytes": 20},
        "perplexity": {"words": {"quantized": 9.0, "original": 8.0, "tokens": 7}},
        "zero_shot": {},
    }
