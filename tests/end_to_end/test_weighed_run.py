"""Runs in which tokens count by the gradients of their loss, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from claq_exp.cli import main

WEIGHED = ["objective=output_gradient", "embedding=none", "threads=1"]
COARSE = ["precision=fixed", "precision.bits=2", "reservation=none"]


def results(tmp_path: Path, name: str) -> dict:
    (path,) = (tmp_path / "outputs" / name).rglob("results.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["plain", "asymmetric", "allocated", "groups"])
def test_a_weighed_run_from_plan_to_numbers(name, tiny_run, tmp_path, capfd):
    more = {
        "plain": COARSE,
        "groups": [*COARSE, "objective.groups=2", "solver=quantease", "solver.sweeps=1"],
        "asymmetric": [*COARSE, "solver.asymmetric=0.25"],
        "allocated": [
            "allocation=rate_distortion",
            *("precision=none", "reservation=none", "allocation.target_bits=9"),
            *("allocation.windows=2", "allocation.codebooks=own", "allocation.row_scales=never"),
        ],
    }[name]
    words = [*tiny_run, *WEIGHED, *more, f"name={name}"]
    assert main(["plan", *words]) == 0
    assert "output gradients" in capfd.readouterr().out
    assert main(words) == 0
    found = results(tmp_path, name)
    assert found["timings"]["gradients"] > 0
    groups = 2 if name == "groups" else 1
    expected = {"name": "output_gradient", "groups": groups, "power": 1.0, "clip": None}
    assert found["config"]["objective"] == expected
    assert not list((tmp_path / "outputs" / name).rglob("work"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["objective.groups=0"], "objective.groups is 0; give a whole number of groups from 1"),
        (["objective.power=2"], "objective.power is 2"),
        (["objective.clip=1"], "objective.clip is 1.0; give a number above 1"),
        (
            ["objective.groups=5"],
            "objective.groups=5 does not divide the 48 rows of model.",
        ),
        (["objective.groups=2", "solver=nearest"], "takes one Hessian for all rows"),
    ],
)
def test_what_cannot_be_weighed_is_refused_in_one_line(words, line, tiny_run, capfd):
    assert main(["plan", *tiny_run, "objective=output_gradient", *words]) == 2
    (found,) = capfd.readouterr().err.strip().splitlines()
    assert line in found
