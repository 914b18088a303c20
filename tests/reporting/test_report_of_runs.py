"""A folder of runs becomes tables and plots that compare like with like."""

from __future__ import annotations

import copy
import csv
import json

import pandas as pd
import pytest

from claq_exp.cli import main
from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.reporting.report import collect_runs, make_report
from claq_exp.reporting.tables import markdown, overlap_notes, result_rows, runs_frame

RESULTS = {
    "schema": 1,
    "status": "finished",
    "run": {"id": "default-1234abcd"},
    "config": {
        "model": {"name": "small"},
        "codebook": {"name": "kmeans"},
        "precision": {"name": "outlier_order", "target_bits": 2.5},
        "reservation": {"name": "outlier_order", "ratio": 0.005},
        "solver": {"name": "gptq"},
        "seed": 3,
    },
    "bits": {"nominal": 2.57, "linear": 3.4, "model": 4.0, "ledger": {}},
    "size": {"checkpoint_bytes": 5_000_000, "original_bytes": 20_000_000},
    "perplexity": {
        "words": {
            "original": 20.0,
            "quantized": 25.25,
            "seqlen": 64,
            "tokens": 12_345,
            "tokens_sha256": "aa",
        }
    },
    "zero_shot": {
        "piqa": {"metric": "acc", "original": 0.71, "quantized": 0.655, "stderr": 0.03, "rows": 200}
    },
}


def result(changes: dict | None = None) -> dict:
    """RESULTS with values at dotted keys replaced; None removes the key."""
    results = copy.deepcopy(RESULTS)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        place = results
        for part in path:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return results


@pytest.fixture
def folder(tmp_path):
    """Write results into run folders, and return the folder above them."""

    def write(*runs: dict):
        for number, results in enumerate(runs):
            run = tmp_path / "outputs" / "name" / f"run-{number}"
            run.mkdir(parents=True)
            (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
        return tmp_path / "outputs"

    return write


def test_one_run_is_a_row_for_each_measure_with_both_models():
    assert result_rows(result()) == [
        ("nominal bits per weight", "16.00", "2.57"),
        ("linear bits per weight", "16.00", "3.40"),
        ("model bits per weight", "16.00", "4.00"),
        ("checkpoint, MB", "20.0", "5.0"),
        ("perplexity, words (12,345 tokens)", "20.00", "25.25"),
        ("piqa acc (200 rows)", "71.0", "65.5 ± 3.0"),
    ]


def test_what_was_not_measured_is_blank_in_the_table_of_a_run():
    rows = result_rows(
        result(
            {
                "perplexity.words.original": 20.0,
                "perplexity.words.quantized": 0.0,
                "zero_shot.piqa.stderr": 0.0,
            }
        )
        | {"perplexity": {"words": {**RESULTS["perplexity"]["words"], "quantized": None}}}
    )
    assert rows[4] == ("perplexity, words (12,345 tokens)", "20.00", "")
    assert rows[5] == ("piqa acc (200 rows)", "71.0", "65.5")


KL = {"words": {"mean": 0.12345, "top1_agreement": 0.9, "tokens": 4_088}}


def test_the_divergence_from_the_original_is_a_row_of_one_run():
    rows = result_rows(result({"kl": KL}))
    assert rows[4][0] == "perplexity, words (12,345 tokens)"
    assert rows[5] == ("KL from original, words (4,088 tokens)", "", "0.1235")
    infinite = {"words": {**KL["words"], "mean": None}}
    assert result_rows(result({"kl": infinite}))[5][2] == ""
    assert result_rows(result({"kl": {}})) == result_rows(result())


def test_the_divergence_is_a_column_when_any_run_has_it(folder):
    runs = folder(
        result({"bits.linear": 3.5}),  # from before it was measured
        result({"kl": KL, "bits.linear": 3.6}),
        result({"kl": {}, "bits.linear": 3.7}),
    )
    make_report(runs, [])
    with (runs / "report.csv").open() as file:
        assert [row["words KL"] for row in csv.DictReader(file)] == ["", "0.12345", ""]
    table = [line for line in (runs / "report.md").read_text().splitlines() if line[:1] == "|"]
    assert table[0].endswith("| words KL | run |")
    assert [line.split(" | ")[-2] for line in table[2:]] == ["", "0.123", ""]
    assert "words KL" not in runs_frame([result(), result({"kl": {}})]).columns


def test_divergences_over_different_tokens_are_refused(folder):
    more = {"words": {**KL["words"], "tokens": 8_176}}
    runs = folder(result({"kl": KL}), result({"kl": more}))
    with pytest.raises(ConfigError, match="small measured the KL on 'words' on different tokens"):
        make_report(runs, [])
    assert not (runs / "report.md").exists()


def test_the_table_of_runs_has_recipe_bits_size_and_measures():
    frame = runs_frame([result()])
    assert frame.iloc[0].to_dict() == {
        "model": "small",
        "codebook": "kmeans",
        "precision": "outlier_order 2.5",
        "reservation": "outlier_order 0.005",
        "solver": "gptq",
        "nominal bits": 2.57,
        "linear bits": 3.4,
        "model bits": 4.0,
        "MB": 5.0,
        "words perplexity": 25.25,
        "piqa acc": 0.655,
        "run": "default-1234abcd",
    }


def test_measures_that_a_run_lacks_are_blank_in_every_form(folder):
    runs = folder(
        result(),
        result({"perplexity": {}, "bits.linear": 3.5}),
        result({"zero_shot": {}, "bits.linear": 3.6}),
    )
    make_report(runs, [])
    with (runs / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["words perplexity"] for row in rows] == ["25.25", "", "25.25"]
    assert [row["piqa acc"] for row in rows] == ["0.655", "0.655", ""]
    table = [line for line in (runs / "report.md").read_text().splitlines() if "kmeans" in line]
    assert "|  |" in table[1]
    assert "nan" not in "".join(table).lower()


def test_an_infinite_perplexity_is_blank_and_does_not_break_the_plot(folder):
    broken = {**RESULTS["perplexity"]["words"], "quantized": None}
    runs = folder(result({"perplexity": {"words": broken}}), result())
    report = make_report(runs, [])
    assert runs / "words_perplexity.png" in report.files
    with (runs / "report.csv").open() as file:
        assert sorted(row["words perplexity"] for row in csv.DictReader(file)) == ["", "25.25"]


def test_runs_are_ordered_by_model_and_linear_bits(folder):
    runs = folder(
        result({"bits.linear": 4.5}),
        result({"config.model.name": "another"}),
        result({"bits.linear": 2.5}),
    )
    frame = make_report(runs, []).frame
    assert list(zip(frame["model"], frame["linear bits"], strict=True)) == [
        ("another", 3.4),
        ("small", 2.5),
        ("small", 4.5),
    ]


def test_config_keys_become_the_first_columns(folder):
    runs = folder(result(), result({"config.seed": 4, "bits.linear": 3.5}))
    make_report(runs, ["seed", "precision.target_bits"])
    header, *rows = (runs / "report.csv").read_text().splitlines()
    assert header.startswith("seed,precision.target_bits,model,")
    assert [row.split(",")[:2] for row in rows] == [["3", "2.5"], ["4", "2.5"]]


@pytest.mark.parametrize(
    "change",
    [
        {"zero_shot.piqa.rows": 100},
        {"zero_shot.piqa.requests_sha256": "ee"},
    ],
    ids=["rows", "requests"],
)
def test_different_questions_under_one_task_are_refused(change, folder):
    runs = folder(result(), result(change))
    with pytest.raises(ConfigError, match="small scored 'piqa' on different questions"):
        make_report(runs, [])


def test_the_average_is_a_row_of_one_run_and_a_column_of_many(folder):
    average = {"average_accuracy": {"original": 0.715, "quantized": 0.5}}
    assert result_rows(result() | average)[-1] == ("average accuracy", "71.5", "50.0")
    frame = runs_frame([result() | average, result(), result() | {"average_accuracy": None}])
    assert frame["average accuracy"].tolist()[0] == 0.5
    assert frame["average accuracy"].isna().tolist() == [False, True, True]
    assert result_rows(result() | {"average_accuracy": None}) == result_rows(result())


def test_a_task_that_measures_no_accuracy_is_not_shown_as_a_share():
    task = {"metric": "word_perplexity", "original": 21.5, "quantized": 30.25, "stderr": None}
    rows = result_rows(result({"zero_shot": {"wikitext": {**task, "rows": 62}}}))
    assert rows[-1] == ("wikitext word_perplexity (62 rows)", "21.50", "30.25")


def test_text_that_calibration_has_seen_is_noted():
    assert overlap_notes(result()) == []
    assert overlap_notes(result({"perplexity.words.overlap": 0.0005})) == []
    row = RESULTS["perplexity"]["words"]
    assert overlap_notes(result({"perplexity.words": {**row, "overlap": None}})) == []
    (line,) = overlap_notes(result({"perplexity.words.overlap": 0.0525}))
    assert line.startswith("5.2 % of the tokens of words are in passages")


@pytest.mark.parametrize("keys", [["solver"], ["model"], ["seed", "seed"]], ids=" ".join)
def test_a_key_that_is_a_column_already_is_no_traceback(keys, folder, capfd):
    assert main(["report", str(folder(result())), "--by", *keys]) in (0, 2)
    assert "Traceback" not in capfd.readouterr().err


def test_different_tokens_under_one_name_are_refused(folder):
    runs = folder(result(), result({"perplexity.words.tokens_sha256": "bb"}))
    with pytest.raises(ConfigError, match="runs of small measured 'words' on different tokens"):
        make_report(runs, [])
    assert not (runs / "report.md").exists()


def test_two_models_may_have_different_tokens_but_no_common_plot(folder):
    runs = folder(
        result(),
        result({"config.model.name": "other|one", "perplexity.words.tokens_sha256": "bb"}),
    )
    report = make_report(runs, [])
    assert [path.name for path in report.files] == ["report.md", "report.csv"]
    text = (runs / "report.md").read_text()
    assert "Original small: words perplexity 20.00, piqa acc 0.710." in text
    assert "Original other|one:" in text


def test_pipes_in_names_do_not_break_the_table(folder):
    runs = folder(result({"config.model.name": "a|b", "run": {"id": "x|y"}}))
    make_report(runs, [])
    lines = [line for line in (runs / "report.md").read_text().splitlines() if line[:1] == "|"]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "a\\|b" in lines[2]
    assert "x\\|y" in lines[2]


def test_values_in_brackets_are_shown_as_they_are(folder, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    runs = folder(result({"config.calibration": {"path": "/data/[old]/a.txt"}}))
    assert main(["report", str(runs), "--by", "calibration.path"]) == 0
    assert "/data/[old]/a.txt" in capfd.readouterr().out


def test_numbers_in_markdown_are_short_and_whole_numbers_stay_whole():
    frame = pd.DataFrame({"a": [12.3456, 0.1234], "b": [7, 8], "c": [None, "x"]})
    assert markdown(frame).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 12.35 | 7 |  |",
        "| 0.123 | 8 | x |",
    ]


def test_a_whole_number_that_only_some_runs_have_stays_whole(folder):
    fixed = {"config.precision": {"name": "fixed", "bits": 4}, "bits.linear": 5.0}
    runs = folder(result(), result(fixed))
    make_report(runs, ["precision.bits"])
    table = [line for line in (runs / "report.md").read_text().splitlines() if "kmeans" in line]
    assert table[0].startswith("|  |")
    assert table[1].startswith("| 4 |")


def test_results_of_a_newer_schema_are_refused(folder):
    runs = folder(result(), result({"schema": 2}))
    with pytest.raises(CheckpointError, match="schema 2; update claq_exp"):
        collect_runs(runs)


def test_unfinished_runs_and_evaluations_are_left_out(folder):
    runs = folder(result(), result({"status": "evaluated", "config": None}))
    assert len(collect_runs(runs)) == 1


def test_a_broken_results_file_is_named(folder):
    runs = folder(result())
    broken = runs / "name" / "broken" / "results.json"
    broken.parent.mkdir()
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"broken/results\.json cannot be read"):
        collect_runs(runs)


def test_the_plot_has_a_line_for_each_method_and_the_original(folder, monkeypatch):
    from matplotlib.axes import Axes

    drawn, horizontal = [], []
    plot, line = Axes.plot, Axes.axhline

    def keep_plot(self, x, y, **options):
        drawn.append((options["label"], list(x), list(y)))
        return plot(self, x, y, **options)

    def keep_line(self, y, **options):
        horizontal.append(y)
        return line(self, y, **options)

    monkeypatch.setattr(Axes, "plot", keep_plot)
    monkeypatch.setattr(Axes, "axhline", keep_line)
    runs = folder(
        result({"bits.linear": 4.5}),
        result(),
        result(
            {"config.precision": {"name": "fixed", "bits": 3}, "config.reservation.name": "none"}
        ),
    )
    make_report(runs, [])
    assert horizontal == [20.0]
    assert drawn == [
        ("kmeans", [3.4], [25.25]),
        (
            "kmeans + AP outlier_order + OR outlier_order 0.005",
            [3.4, 4.5],
            [25.25, 25.25],
        ),
    ]


def test_the_report_fits_a_narrow_terminal(folder, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "40")
    runs = folder(result())
    assert main(["report", str(runs)]) == 0
    output = capfd.readouterr().out
    assert str(runs / "report.md") in output
    assert all(len(line) <= 40 for line in output.splitlines() if not line.startswith("/"))


def test_reporting_twice_gives_the_same_files(folder):
    runs = folder(result())
    make_report(runs, [])
    first = {path.name: path.read_bytes() for path in runs.glob("report.*")}
    make_report(runs, [])
    assert {path.name: path.read_bytes() for path in runs.glob("report.*")} == first
