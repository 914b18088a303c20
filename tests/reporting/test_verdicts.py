"""`claq-exp report --compare` says whether two runs, or two groups of seeds, differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_samples import result, seeded, write_runs
from scipy import stats

from claq_exp.cli import main
from claq_exp.errors import ConfigError
from claq_exp.reporting.compare import compare_folders
from claq_exp.run_folder.windows import WINDOW_FIELDS, write_windows


def write_sums(folder: Path, factor: float, count: int = 24, kl: int = 8, text: str = "t") -> None:
    """Write windows.csv of a run whose losses are `factor` times those of another."""
    generator = np.random.default_rng(0)
    nll, noise = generator.normal(1400.0, 200.0, count), generator.normal(1.0, 0.001, count)
    losses = factor * nll * (noise if factor != 1.0 else 1.0)
    rows = [
        ("words", i, 511, f"{text}{i}", 1300.0, losses[i], factor * nll[i] / 10 if i < kl else None)
        for i in range(count)
    ]
    named = [dict(zip(WINDOW_FIELDS, row, strict=True)) for row in rows]
    write_windows(folder / "windows.csv", named)


@pytest.fixture
def pair(tmp_path):
    first, second = (
        write_runs(tmp_path / name, result()) / "name" / "run-0" for name in ("one", "two")
    )
    write_sums(first, 1.0)
    return first, second


def verdicts(first, second, **options):
    """Measure -> the texts of its row; and the footnotes."""
    tables = compare_folders(first, second, **options)
    (table,) = [table for table in tables if table.title.startswith("Is the difference")]
    return {
        row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows
    }, table.footnotes


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.0, "not distinguishable"), (0.98, "B is better"), (1.02, "A is better")],
)
def test_two_runs_are_told_apart_by_their_windows(factor, said, pair):
    write_sums(pair[1], factor)
    found, notes = verdicts(*pair)
    assert set(found) == {"words perplexity", "words KL"}
    assert found["words perplexity"][2:] == ["24", said]
    assert found["words KL"][2:] == ["8", said]
    assert any("covers the choice of the text, not that of the seed" in note for note in notes)
    percent = found["words KL"][0]
    assert percent == f"{100 * (factor - 1):+.1f} %"
    assert found["words KL"][1] == f"{percent} to {percent}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"text": "u"}, "measured on different content"),
        ({"count": 23}, "measured on different content"),
        ({"kl": 7}, "measured on different content"),
        ({"count": 5, "kl": 5}, "fewer than 6 windows"),
        (None, "no windows.csv"),
    ],
)
def test_windows_that_do_not_compare_give_no_verdict_and_the_reason(options, reason, pair):
    if options is not None:
        write_sums(pair[1], 0.9, **options)
        if options.get("count") == 5:
            write_sums(pair[0], 1.0, **options)
    found, notes = verdicts(*pair)
    assert found["words KL"] == [""] * 4
    assert any(reason in note for note in notes)
    assert ("is better" in str(found)) == (options == {"kl": 7})


def test_results_on_other_tokens_give_no_verdict(tmp_path, pair):
    other = write_runs(tmp_path / "three", result({"perplexity.words.tokens_sha256": "bb"}))
    write_sums(other / "name" / "run-0", 0.9)
    found, notes = verdicts(pair[0], other / "name" / "run-0")
    assert found["words perplexity"] == [""] * 4
    assert "a: measured on different content." in notes


def test_a_damaged_file_of_windows_counts_as_none(pair):
    (pair[1] / "windows.csv").write_text("corpus,window\nwords,7\n")
    found, _ = verdicts(*pair)
    assert found["words perplexity"] == [""] * 4


def test_other_bits_are_said(tmp_path, pair):
    other = write_runs(tmp_path / "three", result({"bits.linear": 4.4})) / "name" / "run-0"
    write_sums(other, 0.9)
    _, notes = verdicts(pair[0], other)
    assert "A has 3.40 linear bits, B 4.40." in notes


# Groups of seeds


def group(folder: Path, values: dict[int, float], bits: float = 2.5) -> Path:
    words = {"original": 20.0, "seqlen": 64, "tokens": 12_345, "tokens_sha256": "aa"}
    runs = [
        seeded(
            seed,
            {
                "perplexity": {"words": {**words, "quantized": value}},
                "config.precision.target_bits": bits,
            },
        )
        for seed, value in values.items()
    ]
    return write_runs(folder, *runs)


@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
def test_groups_of_seeds_get_a_paired_t_interval(shift, tmp_path):
    one = {0: 25.0, 1: 26.0, 2: 24.5, 3: 25.7}
    noise = {0: 0.01, 1: -0.02, 2: 0.02, 3: -0.01}
    two = {seed: value + shift + noise[seed] for seed, value in one.items()}
    folders = group(tmp_path / "one", one), group(tmp_path / "two", two, bits=3.0)
    found, notes = verdicts(*folders)
    theirs = stats.ttest_rel(list(two.values()), list(one.values())).confidence_interval(0.95)
    row = found["words perplexity"]
    assert row[0] == f"25.30 ± {np.std(list(one.values()), ddof=1):.2f}"
    ends = [float(end) for end in row[3].split(" to ")]
    assert ends == pytest.approx(list(theirs), abs=0.006)
    said = "not distinguishable" if not shift else f"{'A' if shift > 0 else 'B'} is better"
    assert row[4:] == ["4", said]
    assert found["words KL"][-1] == "not distinguishable"
    assert found["linear bits"][-1] == ""
    assert any("covers the seed" in note for note in notes)


def test_seeds_are_paired_and_the_others_left_out_by_name(tmp_path):
    one = group(tmp_path / "one", {0: 25.0, 1: 26.0, 5: 99.0})
    two = group(tmp_path / "two", {1: 26.5, 0: 25.4}, bits=3.0)
    found, notes = verdicts(one, two)
    assert found["words perplexity"][2] == "+0.45"
    assert "Left out, for their seed is in one group only: run-2." in notes


def test_one_run_of_each_kind_stands_for_its_seeds(tmp_path):
    folder = group(tmp_path, {0: 25.0, 1: 26.0})
    group(tmp_path, {0: 25.5, 1: 26.4, 2: 27.0}, bits=3.0)
    runs = [folder / "name" / f"run-{number}" for number in (1, 3)]
    found, _ = verdicts(*runs, seeds=True)
    assert found["words perplexity"][2:] == ["+0.45", "-0.19 to +1.09", "2", "not distinguishable"]
    with pytest.raises(ConfigError, match=r"differ in precision\.target_bits.*add --seeds"):
        compare_folders(folder, folder)


def test_groups_that_share_too_few_seeds_are_refused(tmp_path, capfd):
    one = group(tmp_path / "one", {0: 25.0, 1: 26.0})
    two = group(tmp_path / "two", {1: 26.5, 2: 25.4})
    assert main(["report", "--compare", str(one), str(two)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "2 and 2 runs, and 1 seeds that are in both groups" in line


def test_the_command_prints_verdicts(pair, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    write_sums(pair[1], 0.98)
    assert main(["report", "--compare", *map(str, pair), "--into", str(tmp_path)]) == 0
    assert "B is better" in capfd.readouterr().out
    assert "B is better" in (tmp_path / "compare.md").read_text()
