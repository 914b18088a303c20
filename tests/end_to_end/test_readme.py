"""Every command of the README that is one run, on a tiny model.

test_documented_sweeps.py has its sweeps and reports.
"""

from __future__ import annotations

import pytest
from conftest import tiny_words
from documented import README, commands_of, jobs_of, run, shrunk

from claq_exp.cli import main

COMMANDS = commands_of(README)
RUNS = [c for c in COMMANDS if not c.is_sweep and c.words[0] != "report"]


@pytest.fixture(scope="module")
def tiny(tiny_model, text_file) -> list[str]:
    return tiny_words(tiny_model, text_file)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A working directory in which the first command of the README has been run."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shrunk([], tiny)) == 0
    return folder


def test_readme_holds_the_commands_that_are_tested():
    assert len(RUNS) > 10
    lines = README.read_text().splitlines()
    assert sum(line.endswith("pip install -e . && claq-exp") for line in lines) == 1


@pytest.mark.case(77)
@pytest.mark.parametrize("command", RUNS, ids=str)
def test_every_readme_command_runs(command, place, tiny, monkeypatch, capfd):
    monkeypatch.chdir(place)
    assert run(command, tiny) == 0, capfd.readouterr().err


@pytest.mark.case(77)
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.has_overrides], ids=str)
def test_readme_overrides_compose_as_they_stand(command):
    assert jobs_of(command.words) >= 1
