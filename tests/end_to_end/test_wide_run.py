"""Runs that calibrate in float64: measured as all others, and the same on another processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from test_tiny_run import only_run

from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.errors import ConfigError
from claq_exp.run.plan import make_plan

WIDE = "calibration.float64=true"
OTHER = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def ran(words: list[str], outputs: Path, *more: str) -> Path:
    assert main([*words[:-1], *more, f"outputs={outputs}"]) == 0
    return only_run(outputs)


def stored(folder: Path) -> dict[str, str]:
    with safe_open(folder / "checkpoint" / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_only_calibration_is_in_float64(tiny_run, tmp_path):
    plain, wide = ran(tiny_run, tmp_path / "plain"), ran(tiny_run, tmp_path / "wide", WIDE)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (plain, wide))
    perplexity, other = (results["perplexity"]["wikipedia"] for results in (first, second))
    assert plain.name != wide.name
    assert stored(plain) == stored(wide)
    assert first["bits"] == second["bits"]
    assert perplexity["original"] == other["original"]
    assert "float64" not in (plain / "checkpoint" / "README.md").read_text()
    assert "float64=true" in (wide / "checkpoint" / "README.md").read_text()


@pytest.mark.other_process
@pytest.mark.parametrize(
    "chosen",
    [
        ["solver=gptq"],
        ["solver=alternating"],
        ["allocation=rate_distortion", "allocation.target_bits=9", "solver.asymmetric=0.5"],
    ],
    ids=" ".join,
)
def test_another_processor_makes_the_same_checkpoint(chosen, tiny_run, tmp_path):
    here = ran(tiny_run, tmp_path / "here", WIDE, *chosen)
    words = [*tiny_run[:-1], WIDE, *chosen]
    command = [sys.executable, "-m", "claq_exp", *words, f"outputs={tmp_path / 'there'}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **OTHER})
    there = only_run(tmp_path / "there")
    weights = Path("checkpoint", "model.safetensors")
    assert (here / weights).read_bytes() == (there / weights).read_bytes()


def test_a_gpu_is_refused_in_one_line():
    config = compose_config(["evaluation=none", WIDE])
    with pytest.raises(ConfigError, match=r"calibration\.float64=true is for the CPU.*device=cpu"):
        make_plan(config, None, "cuda")
