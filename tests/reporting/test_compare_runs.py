"""Two runs beside each other: every setting and number that differs, and no more."""

from __future__ import annotations

import csv

import pytest
from run_samples import RESULTS, result, write_runs, write_state

from claq_exp.cli import main
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.reporting.compare import compare_runs


@pytest.fixture
def pair(tmp_path):
    """Write two runs in different folders, and return their folders."""

    def make(one, two):
        first, second = write_runs(tmp_path / "one", one), write_runs(tmp_path / "two", two)
        return first / "name" / "run-0", second / "name" / "run-0"

    return make


def write_layers(folder, errors):
    with (folder / "layers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["block", "name", "bits", "output_error"])
        writer.writerows([0, name, bits, error] for name, (bits, error) in errors.items())


def tables(grids):
    return {
        grid.title: {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in grid.rows}
        for grid in grids
    }


def test_beside_a_checkpoint_of_others_only_settings_that_both_have_are_compared(pair):
    external = {"quant_method": "gptq", "form": "", "name": "made", "notes": [], "model": None}
    external |= {"package": "gptqmodel", "version": "7.7", "written_by": "auto-round 0.16"}
    other = result({"status": "evaluated", "external": external, "checkpoint": "made"})
    other["evaluation"] = {"kl_windows": 8}
    own, made = pair(result(), other)
    for runs, name in (((own, made), "B"), ((made, own), "A")):
        settings = compare_runs(*runs)[0]
        assert settings.title == "Settings that differ"
        keys = {row.cells[0].text for row in settings.rows}
        assert {"codebook.name", "solver.name"} <= keys
        assert all(cell.text for row in settings.rows for cell in row.cells)
        assert settings.footnotes == [f"{name} is external: how it was made is not known."]


def test_settings_and_circumstances_that_differ_are_listed_with_both_values(pair):
    other = result(
        {
            "config.precision": {"name": "fixed", "bits": 4},
            "config.name": "again",
            "run.versions": {"python": "3.12"},
            "run.device": "GPU",
        }
    )
    found = tables(compare_runs(*pair(result(), other)))
    assert found["Settings that differ"] == {
        "precision.name": ["outlier_order", "fixed"],
        "precision.target_bits": ["2.5", ""],
        "precision.bits": ["", "4"],
        "name": ["default", "again"],
    }
    assert found["Made by what differs"] == {
        "versions.python": ["3.11", "3.12"],
        "device": ["CPU", "GPU"],
    }


def test_every_measure_has_both_values_difference_and_ratio(pair):
    words = {**RESULTS["perplexity"]["words"], "quantized": 50.5}
    grids = compare_runs(*pair(result(), result({"perplexity": {"words": words}})))
    found = tables(grids)["Measures"]
    assert found["words perplexity"] == ["25.25", "50.50", "+25.25", "2.000"]
    assert found["linear bits"] == ["3.40", "3.40", "0.00", "1.000"]
    (measures,) = [grid for grid in grids if grid.title == "Measures"]
    row = next(row for row in measures.rows if row.cells[0].text == "words perplexity")
    assert [cell.value for cell in row.cells[1:]] == [25.25, 50.5, 25.25, 2.0]
    assert len(found) == 12


def test_numbers_of_different_content_get_no_difference(pair):
    one, two = result(), result({"perplexity.words.tokens_sha256": "bb", "kl": None})
    (grid,) = [grid for grid in compare_runs(*pair(one, two)) if grid.title == "Measures"]
    rows = {row.cells[0].text: row.cells for row in grid.rows}
    assert [cell.text for cell in rows["words perplexity"][1:]] == ["25.25", "25.25", "", ""]
    assert rows["words perplexity"][3].mark == "a"
    assert [cell.text for cell in rows["words KL"][1:]] == ["0.123", "", "", ""]
    assert grid.footnotes == ["a: measured on different content.", "b: not measured."]


def test_a_value_that_is_infinite_or_zero_breaks_nothing(pair):
    words = {**RESULTS["perplexity"]["words"], "quantized": None}
    one = result({"perplexity": {"words": words}, "timings": {"solve": 0.0}})
    found = tables(compare_runs(*pair(one, result())))["Measures"]
    assert found["words perplexity"] == ["", "25.25", "", ""]
    assert found["solve, s"] == ["0.0", "20.0", "+20.0", ""]


def test_the_ledger_shows_the_accounts_that_differ(pair):
    ledger = {"codes": 8_000_000, "other": 80}
    one, two = (
        result({"bits.ledger": {**ledger, "codes": codes}}) for codes in (8_000_000, 16_000_000)
    )
    found = tables(compare_runs(*pair(one, two)))["Stored megabytes by purpose"]
    assert found == {"codes": ["1.000", "2.000", "+1.000", "2.000"]}


def test_the_layers_that_differ_most_come_first(pair):
    first, second = pair(result(), result())
    names = [f"layer.{number}" for number in range(14)]
    write_layers(first, {name: (2.0, 0.1) for name in names} | {"old": (2.0, 0.1)})
    write_layers(
        second,
        {
            name: (2.0, round(0.1 + 0.01 * place * (-1) ** place, 3))
            for place, name in enumerate(names)
        },
    )
    (grid,) = [grid for grid in compare_runs(first, second) if grid.title.startswith("Layers")]
    assert "output error" in grid.title  # no layer differs in bits
    assert [row.cells[0].text for row in grid.rows] == [f"layer.{n}" for n in range(13, 3, -1)]
    assert [cell.text for cell in grid.rows[1].cells[1:]] == [
        "0.1000",
        "0.2200",
        "+0.1200",
        "2.200",
    ]
    assert grid.footnotes == ["3 more layers differ.", "Layers in one of the runs only: 1."]


def test_a_layer_without_a_finite_error_does_not_compare(pair):
    first, second = pair(result(), result())
    write_layers(first, {"a": (2.0, "nan"), "b": (2.0, ""), "c": (2.0, 0.1), "d": (2.0, "inf")})
    write_layers(second, {"a": (2.0, "nan"), "b": (2.0, 0.2), "c": (2.0, 0.3), "d": (2.0, 0.1)})
    (grid,) = [grid for grid in compare_runs(first, second) if grid.title.startswith("Layers")]
    assert [row.cells[0].text for row in grid.rows] == ["c"]


def test_a_run_with_itself_differs_in_nothing(pair):
    first, _ = pair(result(), result())
    chance, measures = compare_runs(first, first)
    assert measures.title == "Measures"
    assert {cell.text for row in chance.rows for cell in row.cells[1:]} == {""}


def test_what_is_no_finished_run_is_refused_in_one_line(tmp_path, pair, capfd):
    first, _ = pair(result(), result())
    bad = write_state(tmp_path / "bad", {"state": "failed", "reason": "no memory"})
    with pytest.raises(ConfigError, match="bad has no results, it is failed: no memory"):
        compare_runs(first, bad)
    with pytest.raises(ConfigError, match="is no run folder"):
        compare_runs(tmp_path, first)
    newer = write_runs(tmp_path / "newer", result({"schema": 2})) / "name" / "run-0"
    with pytest.raises(CheckpointError, match="schema 2"):
        compare_runs(first, newer)
    assert main(["report", "--compare", str(first), str(bad)]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_the_command_prints_and_writes_only_when_asked(pair, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    first, second = pair(result(), result({"config.precision.target_bits": 3.0}))
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", "--compare", str(first), str(second)]) == 0
    output = capfd.readouterr().out
    assert f"A: {first}" in output
    assert "precision.target_bits" in output
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["report", "--compare", str(first), str(second), "--into", str(tmp_path)]) == 0
    text = (tmp_path / "compare.md").read_text()
    assert "| precision.target_bits | 2.5 | 3.0 |" in text
    assert f"* B: `{second}`" in text


@pytest.mark.parametrize("words", [["--compare", "A"], ["A", "--compare", "A", "A"]])
def test_compare_takes_two_runs(words, pair, capfd):
    first, _ = pair(result(), result())
    assert main(["report", *(word.replace("A", str(first)) for word in words)]) == 2
    assert "--compare" in capfd.readouterr().err
