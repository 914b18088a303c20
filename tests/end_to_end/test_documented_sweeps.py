"""Every sweep and every report of README and docs, on a tiny model and with few values."""

from __future__ import annotations

import pytest
from conftest import tiny_words
from documented import DOCS, README, Command, commands_of, few, run, shrunk, write_options

from claq_exp.cli import main

COMMANDS = commands_of(README, *DOCS)
REPORTS = [command for command in COMMANDS if command.words[0] == "report"]
SEEDS = [c for c in COMMANDS if c.page == "docs/reports.md" and c.words[0].startswith("seeds=")]
NEEDS_SLURM = "hydra/launcher=slurm"  # test_documents.py composes it


def different() -> list[Command]:
    """Return the sweeps that are still different in miniature."""
    found = {}
    for command in COMMANDS:
        if command.is_sweep and NEEDS_SLURM not in command.words:
            found.setdefault(tuple(sorted(shrunk(few(list(command.words), 1), []))), command)
    return list(found.values())


SWEEPS = different()
BUDGETS = next(command for command in SWEEPS if "name=budgets" in command.words)


@pytest.fixture(scope="module")
def tiny(tiny_model, text_file) -> list[str]:
    return tiny_words(tiny_model, text_file)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A working directory with a default run and the README's first sweep, two values of a key."""
    folder = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shrunk([], tiny)) == 0
        assert run(BUDGETS, tiny, values=2) == 0
        for name in ("bit_widths", "ablation_components", "baselines"):
            (folder / "outputs" / name).symlink_to(folder / "outputs" / "budgets")
        for command in SEEDS:
            assert run(command, tiny, values=2) == 0
    return folder


@pytest.mark.case(77)
@pytest.mark.parametrize("command", [c for c in SWEEPS if c not in (BUDGETS, *SEEDS)], ids=str)
def test_every_sweep_runs(command, place, tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(place if "name=budgets" in command.words else tmp_path)
    (tmp_path / "outputs").mkdir()
    write_options(tmp_path / "mine")
    (tmp_path / "outputs" / "default").symlink_to(place / "outputs" / "default")
    assert run(command, tiny) == 0, capfd.readouterr().err


@pytest.mark.case(77)
@pytest.mark.parametrize("command", REPORTS, ids=str)
def test_every_report_is_made(command, place, tiny, monkeypatch, capfd):
    monkeypatch.chdir(place)
    assert run(command, tiny) == 0, capfd.readouterr().err
    words = list(command.words)
    folder = words[words.index("--into") + 1] if "--into" in words else words[1]
    assert folder.startswith("--") or (place / folder / "report.md").is_file()
