"""Every command of the README, in its order, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from claq_exp.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^    (claq-exp .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
WITHOUT_OVERRIDES = ("report", "inspect", "dequantize")
SHRUNK = ("model", "calibration", "evaluation", "tracking")  # what the tiny run decides


def shrunk(words: list[str], tiny: list[str]) -> list[str]:
    """Let the tiny run's model, texts and sizes take the place of the command's."""
    groups = {word: word.lstrip("+~").partition("=")[0].split(".")[0] for word in words}
    kept = [word for word in words if groups[word] not in SHRUNK]
    if any(word.startswith(("budget.bits=", "experiment=linear/")) for word in kept):
        kept.append("budget.bits=13")  # in so few rows codebooks and header weigh more than codes
    return [*kept, *(word for word in tiny if not word.startswith("outputs="))]


def test_readme_holds_the_commands_that_are_tested():
    assert len(COMMANDS) > 10
    lines = (ROOT / "README.md").read_text().splitlines()
    assert sum(line.endswith("pip install -e . && claq-exp") for line in lines) == 1


@pytest.mark.case(77)
def test_every_readme_command_runs(tiny_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(shrunk([], tiny_run)) == 0
    for line in COMMANDS:
        found = min((tmp_path / "outputs" / "default").glob("*3.5-reserve*/results.json"))
        words = shlex.split(line.replace("outputs/default/RUN", str(found.parent)))[1:]
        if words[0] in WITHOUT_OVERRIDES:
            arguments = words
        elif words[0] in ("evaluate", "bench"):
            checkpoint = [word for word in words if word.startswith("checkpoint=")]
            rest = [word for word in words if word not in checkpoint]
            arguments = [*shrunk(rest, tiny_run), *checkpoint]
        else:
            arguments = shrunk(words, tiny_run)
        assert main(arguments) == 0, f"{line}\n{capfd.readouterr().err}"
    assert (tmp_path / "outputs" / "budgets" / "report.md").is_file()


@pytest.mark.case(77)
@pytest.mark.parametrize("line", COMMANDS)
def test_readme_overrides_compose_as_they_stand(line):
    from claq_exp.sweep.grid import check_grid

    words = shlex.split(line)[1:]
    if words[0] not in WITHOUT_OVERRIDES:
        assert check_grid([word for word in words if "=" in word]).jobs >= 1
