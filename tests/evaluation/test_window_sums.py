"""windows.csv holds what each window adds, and its sums are the numbers that are printed."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_perplexity_oracle import perplexity, slow, table, windows

from claq_exp.cli import main
from claq_exp.errors import CheckpointError
from claq_exp.evaluation.divergence import Comparison, LogitStore, divergences, rounded
from claq_exp.run_folder.windows import WINDOW_FIELDS, read_windows, write_windows
from claq_exp.sources.cache import cache_folder


@settings(max_examples=20)
@given(count=st.integers(1, 5), seqlen=st.integers(2, 9), batch_size=st.integers(1, 7))
def test_a_window_alone_adds_what_its_perplexity_says(count, seqlen, batch_size):
    model, tokens = table(), windows(count, seqlen)
    found = perplexity(model, tokens, batch_size)
    assert found.value == math.exp(math.fsum(found.window_nll) / found.tokens)
    alone = [(seqlen - 1) * math.log(slow(model, window[None])) for window in tokens]
    assert found.window_nll == pytest.approx(alone, rel=1e-6, abs=1e-6)


def test_the_divergence_is_the_sum_over_its_windows(tmp_path):
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(3, 40, 7, generator=generator) for _ in range(2))
    store = LogitStore(tmp_path, {"a": 3})
    for window in range(3):
        store.record("a", window, before[window])
    comparison = Comparison(store)
    for window in range(3):
        comparison.add("a", window, after[window])
    found = comparison.results()["a"]
    assert found.mean == math.fsum(found.window_kl) / found.tokens
    whole = [divergences(rounded(p), q)[0].sum().item() for p, q in zip(before, after, strict=True)]
    assert found.window_kl == pytest.approx(whole, rel=1e-12)


@pytest.fixture
def run(tiny_run, tmp_path):
    def run(*words: str) -> Path:
        words = ("experiment=rtn_4bit", "threads=1", "evaluation.kl_windows=2", *words)
        known = set((tmp_path / "outputs").rglob("windows.csv"))
        assert main([*tiny_run, *words]) == 0
        (path,) = set((tmp_path / "outputs").rglob("windows.csv")) - known
        return path.parent

    return run


def sums(folder: Path, column: str) -> tuple[float, int]:
    """The sum of a column of windows.csv, and the tokens that it runs over."""
    with (folder / "windows.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[column]]
    return math.fsum(float(row[column]) for row in rows), sum(int(row["tokens"]) for row in rows)


def check_sums(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    for model in ("original", "quantized"):
        total, tokens = sums(folder, f"{model}_nll")
        assert results["perplexity"]["wikipedia"][model] == math.exp(total / tokens)
        assert results["perplexity"]["wikipedia"]["tokens"] == tokens
    total, tokens = sums(folder, "kl")
    assert (results["kl"]["wikipedia"]["mean"], tokens) == (total / tokens, 2 * 63)


def test_the_sums_of_a_run_are_its_results_also_with_a_known_original(run):
    first = run()
    check_sums(first)
    assert list((cache_folder() / "originals").iterdir())
    second = run("precision.bits=3")
    check_sums(second)
    one, two = (read_windows(folder / "windows.csv")["wikipedia"] for folder in (first, second))
    assert one.contents == two.contents
    assert len(set(one.contents)) == len(one.nll) == 6
    assert (one.tokens, len(one.kl)) == ((63,) * 6, 2)
    assert one.nll != two.nll
    assert sums(first, "original_nll") == sums(second, "original_nll")


def test_an_evaluated_checkpoint_has_the_windows_of_its_run(run, tiny_run, tmp_path, capfd):
    folder = run()
    words = [word for word in tiny_run if not word.startswith(("model", "outputs"))]
    place = [f"checkpoint={folder}", f"outputs={tmp_path / 'other'}", "threads=1"]
    assert main(["evaluate", *words, *place, "evaluation.kl_windows=2"]) == 0
    (found,) = (tmp_path / "other").rglob("windows.csv")
    assert found.read_text() == (folder / "windows.csv").read_text()
    check_sums(found.parent)
    assert main(["evaluate", *words, *place, "original=false"]) == 0
    others = set((tmp_path / "other").rglob("windows.csv")) - {found}
    with others.pop().open(newline="") as file:
        assert {(row["original_nll"], row["kl"]) for row in csv.DictReader(file)} == {("", "")}


def rows(count: int) -> list[dict]:
    values = ("a,b", 0, 3, "00ff", None, 1.1, 0.1 + 0.2)
    return [dict(zip(WINDOW_FIELDS, values, strict=True)) | {"window": i} for i in range(count)]


def test_numbers_come_back_as_they_were(tmp_path):
    path = tmp_path / "windows.csv"
    assert read_windows(path) == {}
    last = {**rows(3)[2], "kl": None, "quantized_nll": math.inf}
    write_windows(path, [*rows(2), last])
    (found,) = read_windows(path).values()
    assert found.nll == (1.1, 1.1, math.inf)
    assert found.kl == (0.1 + 0.2,) * 2
    assert found.tokens == (3, 3, 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [("00ff,,1.1", "00ff,,"), (",1,3,", ",7,3,"), ("quantized_nll", "other"), (",3,", ",x,")],
)
def test_a_damaged_file_says_so(old, new, tmp_path):
    path = tmp_path / "windows.csv"
    write_windows(path, rows(2))
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match=r"windows\.csv is damaged"):
        read_windows(path)
