"""`claq-exp report`: files, terminal and refusals."""

from __future__ import annotations

import csv
import json
import re

import pandas as pd
import pytest
from run_samples import RESULTS, result, seeded, write_runs, write_state

from claq_exp.cli import main


@pytest.fixture
def folder(tmp_path):
    """Write results into run folders, and return the folder above them."""
    return lambda *runs: write_runs(tmp_path / "outputs", *runs)


@pytest.fixture
def refusal(capfd):
    """Return the one line of standard error."""

    def read() -> str:
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("claq-exp: report")
        return line

    return read


def test_a_report_is_markdown_csv_latex_and_the_same_table_on_the_terminal(folder, capfd):
    runs = folder(result(), result({"bits.linear": 3.5, "config.solver.name": "nearest"}))
    assert main(["report", str(runs)]) == 0
    output = capfd.readouterr().out
    for name in ("report.md", "report.csv", "report.tex", "report.html"):
        assert str(runs / name) in output.splitlines()
        assert (runs / name).stat().st_size > 0
    linked = re.findall(r"!\[.+\]\((.+)\)", (runs / "report.md").read_text())
    assert "pictures/words_perplexity.png" in linked
    assert all((runs / path).is_file() for path in linked)
    assert f"{runs / 'pictures'} ({len(linked)} pictures, PNG and SVG)" in output.splitlines()
    assert "25.25" in output
    with (runs / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["original"] for row in rows] == ["true", "false", "false"]
    assert [row["words perplexity"] for row in rows] == ["20.0", "25.25", "25.25"]
    assert [row["run"] for row in rows] == ["", "run-0", "run-1"]
    assert r"\begin{tabular}" in (runs / "report.tex").read_text()


def test_several_folders_are_one_report_in_the_first_or_where_it_is_wanted(tmp_path, capfd):
    first = write_runs(tmp_path / "first", result())
    second = write_runs(tmp_path / "second", result({"bits.linear": 3.5}))
    assert main(["report", str(first), str(second)]) == 0
    assert len(pd.read_csv(first / "report.csv")) == 3
    assert not (second / "report.csv").exists()
    into = tmp_path / "new" / "place"
    assert main(["report", str(first), str(second), "--into", str(into)]) == 0
    assert (into / "report.md").read_bytes() == (first / "report.md").read_bytes()


def test_config_keys_become_the_first_columns(folder):
    runs = folder(seeded(3), seeded(4, {"bits.linear": 3.5}))
    assert main(["report", str(runs), "--by", "seed", "precision.target_bits"]) == 0
    header, original, *rows = (runs / "report.csv").read_text().splitlines()
    assert header.startswith("seed,precision.target_bits,model,")
    assert original.startswith(",,small,original,")
    assert [row.split(",")[:2] for row in rows] == [["3", "2.5"], ["4", "2.5"]]


def test_a_pivot_is_asked_for_with_rows_columns_and_metrics(folder):
    runs = folder(
        *(
            seeded(seed, {"config.precision.target_bits": bits, "bits.linear": bits})
            for seed in (0, 1)
            for bits in (2.1, 2.5)
        )
    )
    words = ["--rows", "precision.target_bits", "--columns", "reservation.name"]
    assert main(["report", str(runs), *words, "--metrics", "perplexity.words,kl.words"]) == 0
    frame = pd.read_csv(runs / "report.csv")
    group = "reservation outlier_order"
    assert list(frame.columns) == [
        "precision.target_bits",
        *(f"{group}: {name}" for name in ("linear bits", "linear bits std", "linear bits n")),
        *(f"{group}: {name}" for name in ("nominal bits", "nominal bits std", "nominal bits n")),
        f"{group}: words perplexity",
        f"{group}: words perplexity std",
        f"{group}: words perplexity n",
        *(f"{group}: {name}" for name in ("words KL", "words KL std", "words KL n")),
        f"{group}: n",
        "original",
    ]
    assert frame["precision.target_bits"].tolist()[1:] == [2.1, 2.5]
    assert frame[f"{group}: words perplexity n"].tolist()[1:] == [2, 2]


def test_seeds_are_merged_on_request(folder):
    runs = folder(seeded(0), seeded(1))
    assert main(["report", str(runs), "--seeds"]) == 0
    assert pd.read_csv(runs / "report.csv")["n"].tolist()[1:] == [2]


@pytest.mark.case(88)
def test_runs_without_results_and_notes_stand_below_the_table(folder, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    runs = folder(result())
    write_state(runs / "name" / "bad", {"state": "failed", "reason": "NaN in layer_3"})
    (runs / "name" / "new").mkdir()
    (runs / "name" / "new" / "results.json").write_text(json.dumps(result({"schema": 2})))
    assert main(["report", str(runs)]) == 0
    output = capfd.readouterr().out
    text = (runs / "report.md").read_text()
    assert re.search(r"bad +│ failed +│ NaN in layer_3", output)
    assert "| bad | failed | NaN in layer_3 |" in text
    for shown in (output, text):
        assert "schema 2; update claq_exp" in shown


def test_values_in_brackets_are_shown_as_they_are(folder, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    path = {"config.calibration.path": "/data/[old]/a.txt"}
    runs = folder(result(path), result({"bits.linear": 3.5}))
    assert main(["report", str(runs), "--by", "calibration.path"]) == 0
    assert "/data/[old]/a.txt" in capfd.readouterr().out


def test_the_report_fits_a_narrow_terminal(folder, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "40")
    runs = folder(result())
    assert main(["report", str(runs)]) == 0
    output = capfd.readouterr().out
    assert str(runs / "report.md") in output
    assert all(len(line) <= 40 for line in output.splitlines() if not line.startswith("/"))


def test_reporting_twice_gives_the_same_files(folder):
    runs = folder(result())
    assert main(["report", str(runs)]) == 0
    first = {path.name: path.read_bytes() for path in runs.glob("report.*")}
    assert main(["report", str(runs)]) == 0
    assert {path.name: path.read_bytes() for path in runs.glob("report.*")} == first


@pytest.mark.case(97)
def test_an_infinite_perplexity_is_blank_and_breaks_nothing(folder):
    broken = {**RESULTS["perplexity"]["words"], "quantized": None}
    runs = folder(result({"perplexity": {"words": broken}}), result({"bits.linear": 3.5}))
    assert main(["report", str(runs)]) == 0
    assert pd.read_csv(runs / "report.csv")["words perplexity"].isna().tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.case(93)
def test_numbers_that_do_not_compare_leave_no_report(folder, refusal):
    runs = folder(result(), result({"perplexity.words.tokens_sha256": "bb"}))
    assert main(["report", str(runs)]) == 2
    assert "different tokens" in refusal()
    assert list(runs.glob("report.*")) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "report needs a folder, e.g. claq-exp report outputs/default"),
        (["FOLDER", "--colums", "seed"], "unrecognized arguments: --colums"),
        (["FOLDER", "--rows"], "--rows: expected one argument"),
        (["FOLDER", "--by", "seed", "--rows", "seed"], "add its keys to --rows"),
        (["FOLDER", "--metrics", "speed"], "measure 'speed' is not known; choose one of"),
        (["FOLDER", "--rows", "seeds"], "no run has a config key 'seeds'; did you mean seed?"),
        (["FOLDER", "--sort", "size"], "no run has a config key 'size'"),
        (["FOLDER", "--online"], "--project and --online are for --wandb and --replay"),
        (["FOLDER/none"], "none' is no folder"),
    ],
)
def test_wrong_words_are_one_line_and_exit_two(words, message, folder, refusal):
    runs = folder(result())
    assert main(["report", *(word.replace("FOLDER", str(runs)) for word in words)]) == 2
    assert message in refusal()


def test_help_names_the_command(capfd):
    assert main(["report", "--help"]) == 0
    assert "claq-exp report FOLDER" in capfd.readouterr().out
