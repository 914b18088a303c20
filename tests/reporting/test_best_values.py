"""Bold is the best value, and every value that it is not surely better than."""

from __future__ import annotations

import numpy as np
import pytest
from run_samples import RESULTS, seeded, write_runs
from scipy import stats

from claq_exp.reporting.best import BY_SEEDS, BY_WINDOWS
from claq_exp.reporting.collect import collect
from claq_exp.reporting.pivot import pivot_table
from claq_exp.reporting.runs_table import runs_table
from claq_exp.reporting.terminal import to_terminal
from claq_exp.run_folder.windows import WINDOW_FIELDS, write_windows

SOLVERS = ["gptq", "nearest", "other"]


def words(value: float) -> dict:
    return {"words": {**RESULTS["perplexity"]["words"], "quantized": value}}


def recipe(number: int, value: float, seed: int = 3) -> dict:
    """A run of one of three recipes, each at bits of its own, so that they stand in order."""
    change = {"perplexity": words(value), "bits.linear": 3.0 + number, "kl": {}}
    return seeded(seed, {**change, "config.solver.name": SOLVERS[number]})


def bold(table, heading: str = "words perplexity") -> list[bool]:
    place = table.columns.index(heading)
    return [row.cells[place].best for row in table.rows if not row.original]


def merged(folder, groups: list[list[float]]):
    runs = [
        recipe(number, value, seed)
        for number, group in enumerate(groups)
        for seed, value in enumerate(group)
    ]
    return runs_table(collect([write_runs(folder, *runs)]), "t", seeds=True)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[20.0, 20.2, 20.1], [20.3, 20.1, 20.4], [25.0, 25.1, 25.2]], [True, True, False]),
        ([[20.0, 20.2, 20.1], [22.0, 22.2, 22.1], [25.0, 25.1, 25.2]], [True, False, False]),
        ([[20.0, 21.0], [24.0, 25.0], [40.0, 40.1]], [True, True, False]),  # two tell little
        ([[20.0], [20.3, 20.0, 20.6], [25.0]], [True, True, False]),  # one run has no width
        ([[20.0], [20.3], [25.0]], [True, False, False]),
    ],
)
def test_means_whose_intervals_overlap_the_best_ones_are_bold(groups, expected, tmp_path):
    table = merged(tmp_path, groups)
    assert bold(table) == expected
    several = max(map(len, groups)) > 1
    assert (BY_SEEDS in table.footnotes) == (several and sum(expected) > 1)
    assert "Bold: best of its column." in table.footnotes


def test_the_interval_of_a_mean_is_scipys(tmp_path):
    """The edge of overlap, from either side of it."""
    best, other = np.array([20.0, 20.2, 20.4, 20.1]), np.array([0.0, 0.3, 0.1, 0.2])
    ends = [stats.ttest_1samp(values, 0.0).confidence_interval(0.95) for values in (best, other)]
    edge = ends[0].high - ends[1].low  # shifted by this, the two intervals touch
    for number, (shift, expected) in enumerate({edge - 0.01: True, edge + 0.01: False}.items()):
        table = merged(tmp_path / str(number), [list(best), list(other + shift)])
        assert bold(table) == [True, expected]


def write_sums(folder, factor: float, noise: float) -> None:
    generator = np.random.default_rng(int(1e5 * factor))
    nll = np.random.default_rng(0).normal(1400.0, 200.0, 24)
    nll *= factor * generator.normal(1.0, noise, 24)
    rows = [("words", i, 511, f"t{i}", 1300.0, value, None) for i, value in enumerate(nll)]
    write_windows(
        folder / "windows.csv", [dict(zip(WINDOW_FIELDS, row, strict=True)) for row in rows]
    )


def singles(tmp_path, noise: float = 0.003):
    runs = [recipe(number, value) for number, value in enumerate([20.0, 20.1, 21.0])]
    folder = write_runs(tmp_path, *runs)
    for number, factor in enumerate([1.0, 1.0005, 1.02]):
        write_sums(folder / "name" / f"run-{number}", factor, noise)
    return collect([folder])


def test_single_runs_are_told_apart_by_their_windows(tmp_path):
    table = runs_table(singles(tmp_path), "t")
    assert bold(table) == [True, True, False]
    assert BY_WINDOWS in table.footnotes
    pivot = pivot_table(singles(tmp_path / "again"), "t", rows=["solver"])
    assert bold(pivot) == [True, True, False]
    across = pivot_table(singles(tmp_path / "across"), "t", rows=["seed"], columns=["solver"])
    assert BY_WINDOWS not in across.footnotes  # one row has no rival


def test_without_windows_the_best_alone_is_bold(tmp_path):
    found = singles(tmp_path)
    for run in found.runs:
        (run.folder / "windows.csv").unlink()
    table = runs_table(found, "t")
    assert bold(table) == [True, False, False]
    assert BY_WINDOWS not in table.footnotes


def test_a_narrow_terminal_keeps_the_number_of_seeds(tmp_path):
    table = merged(tmp_path, [[20.0, 20.2], [22.0, 22.2], [25.0, 25.1]])
    for width in (200, 60, 30):
        (drawn,) = to_terminal(table, width)
        assert drawn.columns[-1].header == "n" or width == 200
        assert "n" in [column.header for column in drawn.columns]


def test_one_recipe_in_a_narrow_terminal_has_a_row_for_each_number(tmp_path):
    table = merged(tmp_path, [[20.0, 20.2, 20.4]])
    (wide,), (narrow,) = (to_terminal(table, width) for width in (300, 80))
    assert len(wide.columns) == len(table.columns)
    assert [column.header for column in narrow.columns] == ["", "original", "quantized"]
    cells = dict(zip(*(list(narrow.columns[place].cells) for place in (0, 2)), strict=True))
    assert cells["words perplexity"] == "20.20 ± 0.20"
    assert cells["n"] == "3"
    assert "Of model small, codebook kmeans" in narrow.caption
