"""Every command of docs/ that is one run, on a tiny model; scripts and links of all pages.

test_documented_sweeps.py has the sweeps and reports.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from conftest import tiny_words
from documented import (
    DOCS,
    README,
    ROOT,
    commands_of,
    jobs_of,
    lines_of,
    run,
    shrunk,
    write_options,
)
from own_strategies import forget_strategies, write_strategies

from claq_exp.cli import main

COMMANDS = [c for c in commands_of(README, *DOCS) if c.page != "README.md"]
RUNS = [c for c in COMMANDS if not c.is_sweep and c.words[0] != "report"]
BOOKS = "noise.json"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
INLINE = {  # in the middle of a sentence; what is no command has dots or a word in capitals
    words: page
    for page in [README, *DOCS]
    for words in re.findall(r"`claq-exp ([^`]+)`", page.read_text())
    if not re.search(r"\.\.\.|[A-Z]{3}|^[a-z]+( runtime)?$|^report|--help", words)
}


@pytest.fixture(scope="module")
def tiny(tiny_model, text_file) -> list[str]:
    return tiny_words(tiny_model, text_file)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A working directory with a default run, and what docs say how to make.

    Codebooks as docs/bcq.md makes them, own options, own strategies.
    """
    folder = tmp_path_factory.mktemp("documents")
    write_options(folder / "mine")
    own = write_strategies(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        assert main(shrunk([], tiny)) == 0
        script = ROOT / "benchmarks" / "universal_codebooks.py"
        patch.setattr(sys, "argv", [str(script), "--quick", "--out", BOOKS, "--models"])
        patch.syspath_prepend(str(script.parent))
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(script), run_name="__main__")
        yield folder
    forget_strategies(own)


def test_docs_hold_the_commands_that_are_tested():
    assert len(RUNS) > 5
    assert len(INLINE) > 3


@pytest.mark.parametrize("command", RUNS, ids=str)
def test_every_command_of_the_docs_runs(command, place, tiny, monkeypatch, capfd):
    monkeypatch.chdir(place)
    assert run(command, tiny) == 0, capfd.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.has_overrides], ids=str)
def test_overrides_of_the_docs_compose_as_they_stand(command, place, monkeypatch):
    from claq_exp.compose.options import own_folders
    from claq_exp.compose.words import folders_of

    monkeypatch.chdir(place)
    with own_folders(folders_of(list(command.words))):
        assert jobs_of(command.words) >= 1


@pytest.mark.parametrize("words", INLINE)
def test_overrides_in_sentences_compose(words):
    assert jobs_of(shlex.split(words)) >= 1


def test_torchrun_starts_what_composes():
    lines = [line for page in [README, *DOCS] for line in lines_of(page) if "torchrun" in line]
    assert lines
    for line in lines:
        head, _, words = line.partition(" -m claq_exp ")
        assert head == "torchrun --nproc-per-node 2"  # tests/distributed runs it
        assert jobs_of(shlex.split(words)) == 1


def anchors(page: Path) -> set[str]:
    """The names that headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w -]", "", text.lower()).strip().replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *DOCS], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_scripts_that_a_page_names_take_the_options_that_it_gives_them(page, monkeypatch, capsys):
    """test_benchmarks.py and test_gpu_check.py run the scripts themselves."""
    text = page.read_text()
    for script, words in re.findall(r"python benchmarks/(\w+\.py)([^`\n]*)", text):
        path = ROOT / "benchmarks" / script
        assert path.is_file()
        options = re.findall(r"--[a-z-]+", words)
        source = path.read_text() + (ROOT / "benchmarks" / "common.py").read_text()
        assert all(f'"{option}"' in source for option in options), (script, options)
