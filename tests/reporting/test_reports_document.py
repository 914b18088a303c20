"""The commands and promises of docs/reports.md hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from run_samples import result, seeded, write_runs

from claq_exp.cli import main

TEXT = (Path(__file__).parents[2] / "docs" / "reports.md").read_text()
COMMANDS = re.findall(r"^    claq-exp (report .*)$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_runs(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_runs(tmp_path / "outputs" / "default", result(), seeded(4, {"config.name": "b"}))
    write_runs(tmp_path / "outputs" / "budgets", result({"config.precision.target_bits": 3.0}))
    for name, bits in (("a", 2.5), ("b", 3.0)):
        own = {"config.precision.target_bits": bits}
        write_runs(tmp_path / "outputs" / name, *(seeded(seed, own) for seed in range(3)))
    run = next((tmp_path / "outputs" / "default").rglob("run-0"))
    (run / "events.jsonl").write_text("")
    words = shlex.split(line.replace("outputs/default/RUN", str(run)))
    assert main(words) == 0


def test_every_option_of_the_command_is_described():
    from claq_exp.reporting.command import _parser

    options = {word for action in _parser()._actions for word in action.option_strings}
    assert options == set(re.findall(r"--[a-z]+", TEXT))
