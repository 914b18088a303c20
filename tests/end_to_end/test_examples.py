"""The scripts of examples/ run as their first lines say, on the tiny model."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from claq_exp.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {"quantize_folder.py", "own_strategy.py", "read_bits.py"}


@pytest.fixture(scope="module")
def place(tiny_model, text_file, tmp_path_factory) -> Path:
    """A working directory; model and text have names that a command line would need quotes for."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(tiny_model, folder / "a model, tiny")
    shutil.copy(text_file, folder / "some words (1).txt")
    return folder


def run(script: str, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        patch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    sys.modules.pop("own_strategy", None)


def test_every_script_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == SCRIPTS


def test_a_folder_is_quantized_from_python_and_its_bits_are_read(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for word in ("(new)", "(found)"):
        run("quantize_folder.py", "a model, tiny", "some words (1).txt")
        printed = capsys.readouterr().out
        assert word in printed
        assert re.search(r"perplexity: \d+\.\d+ -> \d+\.\d+\n", printed)
        assert "the cat sees" in printed
    (folder,) = (place / "outputs" / "default").iterdir()
    run("read_bits.py", str(folder))
    printed = capsys.readouterr().out
    size = sum(path.stat().st_size for path in (folder / "checkpoint").glob("*.safetensors"))
    counted = [int(bits.replace(",", "")) for bits in re.findall(r"([\d,]+) bytes\n", printed)]
    assert 0 <= sum(counted) - size < 20_000  # config.json is counted too
    assert "column codebooks" in printed


def test_a_strategy_of_ones_own_is_compared_at_the_same_bits(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    run("own_strategy.py", "a model, tiny", "some words (1).txt")
    rows = re.findall(r": (\d\.\d\d) bits, perplexity (\d+\.\d+)", capsys.readouterr().out)
    (claq, one), (own, other) = rows
    assert float(claq) == pytest.approx(float(own), abs=0.05)  # whole columns
    assert one != other


def test_the_command_of_the_example_works_in_its_folder(tiny_run, tmp_path, monkeypatch, capfd):
    shutil.copy(EXAMPLES / "own_strategy.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = (EXAMPLES / "own_strategy.py").read_text()
    words = re.search(r"^    claq-exp (.*)$", text, re.M)[1].split()
    try:
        assert main([*tiny_run, *words]) == 0, capfd.readouterr().err
        (first,) = (tmp_path / "outputs" / "default").iterdir()
        changed = text.replace("bits[largest_first[: round", "bits[largest_first[1 : 1 + round")
        (tmp_path / "own_strategy.py").write_text(changed)
        sys.modules.pop("own_strategy")
        assert main([*tiny_run, *words]) == 0, capfd.readouterr().err
        assert len([*(tmp_path / "outputs" / "default").iterdir()]) == 2  # changed code, a new run
    finally:
        sys.modules.pop("own_strategy", None)
    assert first.is_dir()
