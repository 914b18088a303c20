"""The GPU benchmark says in one line that it needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_solve.py"


def test_without_a_gpu_the_benchmark_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--bits", "2"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in done.stderr
