"""One run as a table, original against quantized."""

from __future__ import annotations

import pytest
from run_samples import RESULTS, result

from claq_exp.reporting.tables import overlap_notes, result_rows, result_table

KL = RESULTS["kl"]


def test_one_run_is_a_row_for_each_measure_with_both_models():
    assert result_rows(result()) == [
        ("nominal bits per weight", "16.00", "2.57"),
        ("linear bits per weight", "16.00", "3.40"),
        ("model bits per weight", "16.00", "4.00"),
        ("checkpoint, MB", "20.0", "5.0"),
        ("perplexity, words (12,345 tokens)", "20.00", "25.25"),
        ("KL from original, words (4,088 tokens)", "", "0.1235"),
        ("piqa acc (200 rows)", "71.0", "65.5 ± 3.0"),
    ]


def test_what_was_not_measured_is_blank_in_the_table_of_a_run():
    row = {**RESULTS["perplexity"]["words"], "quantized": None}
    rows = result_rows(result({"perplexity.words": row, "zero_shot.piqa.stderr": 0.0}))
    assert rows[4] == ("perplexity, words (12,345 tokens)", "20.00", "")
    assert rows[6] == ("piqa acc (200 rows)", "71.0", "65.5")


def test_a_perplexity_of_nonsense_is_short_and_a_small_divergence_is_no_zero():
    row = {**RESULTS["perplexity"]["words"], "quantized": 2.15e31}
    rows = result_rows(
        result({"perplexity.words": row, "kl": {"words": {"tokens": 9, "mean": 2e-5}}})
    )
    assert rows[4] == ("perplexity, words (12,345 tokens)", "20.00", "2.15e+31")
    assert rows[5][2] == "2e-05"


def test_a_divergence_is_blank_where_it_is_infinite_and_absent_in_older_results():
    infinite = {"words": {**KL["words"], "mean": None}}
    assert result_rows(result({"kl": infinite}))[5][2] == ""
    assert result_rows(result({"kl": {}})) == result_rows(result({"kl": None}))


def test_the_average_is_a_row_of_one_run():
    average = {"average_accuracy": {"original": 0.715, "quantized": 0.5}}
    assert result_rows(result(average))[-1] == ("average accuracy", "71.5", "50.0")


def test_layers_that_needed_a_fallback_are_a_row_of_one_run():
    assert result_rows(result({"fallbacks": {"layers": 0}})) == result_rows(result())
    row = result_rows(result({"fallbacks": {"layers": 1_203}}))[-1]
    assert row == ("layers with a fallback", "", "1,203")


def test_a_task_that_measures_no_accuracy_is_not_shown_as_a_share():
    task = {"metric": "word_perplexity", "original": 21.5, "quantized": 30.25, "stderr": None}
    rows = result_rows(result({"zero_shot": {"wikitext": {**task, "rows": 62}}}))
    assert rows[-1] == ("wikitext word_perplexity (62 rows)", "21.50", "30.25")


@pytest.mark.case(63)
def test_text_that_calibration_has_seen_is_noted():
    assert overlap_notes(result()) == []
    assert overlap_notes(result({"perplexity.words.overlap": 0.0005})) == []
    row = RESULTS["perplexity"]["words"]
    assert overlap_notes(result({"perplexity.words": {**row, "overlap": None}})) == []
    (line,) = overlap_notes(result({"perplexity.words.overlap": 0.0525}))
    assert line.startswith("5.2 % of the tokens of words are in passages")


AFTER = {
    "perplexity": {"words": 23.0},
    "kl": {"words": 0.1},
    "zero_shot": {"piqa": 0.66},
    "average_accuracy": None,
}


def test_a_stage_that_was_measured_after_has_a_column():
    table = result_table(result({"after": {"quantize": AFTER}}))
    assert [column.header for column in table.columns] == [
        "",
        "original",
        "after quantize",
        "quantized",
    ]
    labels, _, then, end = ([*column.cells] for column in table.columns)
    found = dict(zip(labels, then, strict=True))
    assert found["perplexity, words (12,345 tokens)"] == "23.00"
    assert found["KL from original, words (4,088 tokens)"] == "0.1000"
    assert found["piqa acc (200 rows)"] == "66.0"
    assert sum(bool(cell) for cell in then) == 3
    assert len(result_table(result()).columns) == 3
    assert "25.25" in end
