"""Every script of benchmarks/ in miniature: it ends well, and its figures are numbers."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARED = {"common.py", "device_time.py", "gpu_report.py", "tiny_model.py"}
OF_A_GPU = {path.name for path in BENCHMARKS.glob("gpu_*.py")} - SHARED  # test_gpu_check.py
MINIATURES = {  # script -> further words, and the least lines of figures
    "column_loop.py": ([], 1),
    "column_sweep.py": ([], 2),
    "layer_losses.py": ([], 2),
    "evaluation.py": ([], 1),
    "ledger.py": ([], 1),
    "model_solve.py": ([], 4),
    "packed_linear.py": ([], 2),
    "packed_ends.py": ([], 8),
    "rounded_forward.py": (["activation=lo_bcq"], 1),
    "big_model.py": (["--folder", "FOLDER"], 1),
    "universal_codebooks.py": (["--out", "FOLDER/books.json"], 36),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script as `python benchmarks/SCRIPT --quick WORDS` does, and return its figures."""

    def run_script(script: str, words: list[str]) -> list[dict]:
        figures = tmp_path / "figures"
        given = [word.replace("FOLDER", str(tmp_path)) for word in words]
        own = [str(BENCHMARKS / script), "--quick", "--figures", str(figures), *given]
        monkeypatch.setattr(sys, "argv", own)
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        threads = torch.get_num_threads()
        try:
            runpy.run_path(own[0], run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, ended.code
        finally:
            torch.set_num_threads(threads)
        return [json.loads(line) for line in figures.read_text().splitlines()]

    return run_script


@pytest.mark.parametrize("script", MINIATURES)
def test_a_benchmark_runs_in_miniature_and_its_figures_are_finite(script, run):
    words, least = MINIATURES[script]
    lines = run(script, words)
    assert len(lines) >= least
    for line in lines:
        numbers = [value for value in line.values() if isinstance(value, int | float)]
        assert numbers
        assert all(math.isfinite(number) and number >= 0 for number in numbers), line


def test_every_benchmark_is_tested_and_documented():
    scripts = {path.name for path in BENCHMARKS.glob("*.py")} - SHARED
    assert scripts == set(MINIATURES) | OF_A_GPU | {"soak.py"}  # test_soak.py
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    assert not [script for script in sorted(scripts) if f"`{script}`" not in page]


def test_a_plain_loop_and_ours_agree_in_miniature(run):
    (line,) = run("evaluation.py", [])
    assert line["perplexity"] == pytest.approx(line["plain_perplexity"], rel=1e-3)


def test_calibration_costs_more_than_a_forward_pass_and_less_than_one_for_each_layer(run):
    lines = run("model_solve.py", ["--bits", "2"])
    (passes,) = (line["forward_passes"] for line in lines if "forward_passes" in line)
    assert 1 < passes < 5


def test_a_figure_that_is_not_finite_ends_a_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    common = runpy.run_path(str(BENCHMARKS / "common.py"))
    with pytest.raises(SystemExit, match="ratio is nan"):
        common["note"](None, shape="4x4", ratio=math.nan)


@pytest.mark.parametrize("script", sorted(OF_A_GPU - {"gpu_check.py"}))
def test_without_a_gpu_a_gpu_benchmark_says_so_in_one_line(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    assert "no CUDA device" in said.err
