"""A pivot merges what differs in seeds only, loses no value, and agrees with pandas."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_samples import RESULTS, seeded, write_runs, write_state

from claq_exp.errors import ConfigError
from claq_exp.reporting.collect import collect
from claq_exp.reporting.pivot import pivot_table
from claq_exp.run_folder import FAILED, RunState
from claq_exp.run_folder.jobs import Job, write_job

BITS, METHOD = "precision.target_bits", "reservation.name"


def run(target, reservation, value, seed=0, **changes):
    """A run at a target of bits by a way of reservation, with its perplexity."""
    words = {**RESULTS["perplexity"]["words"], "quantized": value}
    return seeded(
        seed,
        {
            "config.precision.target_bits": target,
            "config.reservation": {"name": reservation},
            "bits.linear": target + 0.25,
            "bits.nominal": target,
            "perplexity": {"words": words},
            **changes,
        },
    )


def pivot(folder, *runs, rows=(BITS,), columns=(METHOD,), **options):
    write_runs(folder, *runs)
    return pivot_table(collect([folder]), "title", rows=rows, columns=columns, **options)


def cell(table, row, group, label):
    """The cell in the row that begins with a text, below a group."""
    groups = table.groups or [""] * len(table.columns)
    place = list(zip(groups, table.columns, strict=True)).index((group, label))
    (found,) = [line for line in table.rows if line.cells[0].text == row]
    return found.cells[place]


def test_rows_and_columns_are_settings_with_bits_beside_each_metric(tmp_path):
    table = pivot(
        tmp_path,
        run(2.5, "none", 50.0),
        run(2.5, "outlier_order", 40.0),
        run(3, "none", 30.0),
        run(3, "outlier_order", 25.0),
        metrics=["perplexity"],
    )
    assert table.columns == [BITS, *["linear bits", "nominal bits", "words perplexity"] * 2]
    groups = ["reservation none"] * 3 + ["reservation outlier_order"] * 3
    assert table.groups == ["", *groups]
    assert [[cell.text for cell in row.cells] for row in table.rows] == [
        ["original", "16.00", "16.00", "20.00", "16.00", "16.00", "20.00"],
        ["2.5", "2.75", "2.50", "50.00", "2.75", "2.50", "40.00"],
        ["3", "3.25", "3.00", "30.00", "3.25", "3.00", "25.00"],
    ]
    best = [False, False, False, True, False, False, True]
    assert [cell.best for cell in table.rows[2].cells] == best
    assert table.headings()[3] == "reservation none: words perplexity"
    assert table.rows[0].original


@pytest.mark.case(99)
def test_one_run_of_a_cell_shows_no_deviation_and_several_show_it_with_their_number(tmp_path):
    values = [50.0, 53.0, 49.5]
    table = pivot(
        tmp_path,
        *(run(2.5, "none", value, seed) for seed, value in enumerate(values)),
        run(2.5, "outlier_order", 40.0),
    )
    merged = cell(table, "2.5", "reservation none", "words perplexity")
    assert merged.text == "50.83 ± 1.89"
    assert merged.value == pytest.approx(statistics.mean(values))
    assert merged.deviation == pytest.approx(statistics.stdev(values))
    assert cell(table, "2.5", "reservation none", "n").text == "3"
    assert cell(table, "2.5", "reservation none", "linear bits").text == "2.75"
    alone = cell(table, "2.5", "reservation outlier_order", "words perplexity")
    assert (alone.text, alone.deviation, alone.count) == ("40.00", None, 1)
    assert cell(table, "2.5", "reservation outlier_order", "n").text == "1"


def test_a_measure_that_only_some_seeds_have_shows_how_many(tmp_path):
    table = pivot(
        tmp_path,
        run(2.5, "none", 50.0, 0),
        run(2.5, "none", 52.0, 1),
        run(2.5, "none", 54.0, 2, **{"kl": None}),
    )
    assert cell(table, "2.5", "reservation none", "words KL").text == "0.123 ± 0.000 (n=2)"


def test_a_strategy_that_draws_with_the_seed_still_differs_in_seeds_only(tmp_path):
    runs = [
        run(2.5, "none", 50.0 + s, s, **{"config.codebook": {"name": "sklearn", "seed": s}})
        for s in range(2)
    ]
    table = pivot(tmp_path, *runs)
    assert cell(table, "2.5", "reservation none", "n").text == "2"


def test_runs_that_differ_in_more_than_seeds_are_refused_with_what_to_add(tmp_path):
    other = run(2.5, "none", 51.0, 1, **{"config.calibration.windows": 16})
    with pytest.raises(ConfigError) as refused:
        pivot(tmp_path, run(2.5, "none", 50.0), other)
    assert str(refused.value) == (
        "report: 2 runs share precision.target_bits=2.5, reservation.name=none and differ in "
        "calibration.windows; only seeds are merged, so add one of these, "
        "e.g. --rows precision.target_bits,calibration.windows"
    )
    table = pivot(tmp_path, rows=(BITS, "calibration.windows"))
    assert [row.cells[1].text for row in table.rows] == ["", "8", "16"]


def test_another_draw_of_the_evaluation_text_is_no_seed(tmp_path):
    def text(seed):
        return {"config.evaluation": {"corpora": {"words": {"seed": seed}}}}

    with pytest.raises(ConfigError, match=r"differ in evaluation\.corpora\.words\.seed;"):
        pivot(tmp_path, run(2.5, "none", 1.0, **text(0)), run(2.5, "none", 1.0, **text(1)))


def test_neutral_settings_do_not_keep_seeds_apart(tmp_path):
    more = {"config.name": "again", "config.tracking": {"name": "wandb"}}
    table = pivot(tmp_path, run(2.5, "none", 50.0, 0), run(2.5, "none", 51.0, 1, **more))
    assert cell(table, "2.5", "reservation none", "n").text == "2"


def test_the_same_draw_twice_is_refused_and_its_name_keeps_it_apart(tmp_path):
    twice = run(2.5, "none", 50.0, 0, **{"config.name": "again"})
    with pytest.raises(
        ConfigError, match=r"one draw, not two; .*--rows precision\.target_bits,name"
    ):
        pivot(tmp_path, run(2.5, "none", 50.0, 0), twice)
    assert len(pivot(tmp_path, rows=(BITS, "name")).rows) == 3


def test_an_empty_cell_says_whether_its_run_failed_or_never_was(tmp_path):
    write_runs(tmp_path, run(2.5, "none", 50.0), run(3.0, "outlier_order", 40.0))
    config = run(3.0, "none", 1.0)["config"]
    write_state(tmp_path / "name" / "bad", {"state": "failed", "reason": "no memory"}, config)
    table = pivot(tmp_path)
    blank = cell(table, "3", "reservation none", "words perplexity")
    assert (blank.text, blank.value, blank.mark) == ("", None, "b")
    assert cell(table, "2.5", "reservation outlier_order", "linear bits").mark == "a"
    assert table.footnotes[:2] == ["a: no run.", "b: failed: no memory."]


def test_a_job_that_failed_without_a_folder_is_the_reason_of_its_cell(tmp_path):
    write_runs(tmp_path, run(2.5, "none", 50.0), run(3.0, "outlier_order", 40.0))
    words = ("precision.target_bits=3.0", "reservation=none")
    write_job(tmp_path / "name", Job(0, words, RunState(FAILED, "killed it")))
    table = pivot(tmp_path)
    blank = cell(table, "3", "reservation none", "words perplexity")
    assert f"{blank.mark}: failed: killed it." in table.footnotes


def test_a_job_that_does_not_tell_its_place_gives_no_cell_a_reason(tmp_path):
    write_runs(tmp_path, run(2.5, "none", 50.0), run(3.0, "outlier_order", 40.0))
    write_job(tmp_path / "name", Job(0, ("experiment=rtn_4bit",), RunState(FAILED, "gone")))
    assert "gone" not in " ".join(pivot(tmp_path).footnotes)


def test_several_models_become_rows_with_an_original_each(tmp_path):
    other = {"config.model.name": "other"}
    table = pivot(
        tmp_path,
        run(2.5, "none", 50.0),
        run(3.0, "none", 30.0),
        run(2.5, "none", 9.0, **other),
        run(3.0, "none", 8.0, **other),
    )
    assert table.columns[:2] == ["model.name", BITS]
    assert [[cell.text for cell in row.cells[:2]] for row in table.rows] == [
        ["other", "original"],
        ["small", "original"],
        ["other", "2.5"],
        ["other", "3"],
        ["small", "2.5"],
        ["small", "3"],
    ]
    place = table.columns.index("words perplexity")
    assert [row.cells[place].best for row in table.rows] == [False] * 3 + [True, False, True]


def test_models_across_share_one_original_row(tmp_path):
    words = {**RESULTS["perplexity"]["words"], "original": 8.0, "quantized": 9.0}
    other = {"config.model.name": "other", "perplexity": {"words": words}}
    table = pivot(
        tmp_path,
        run(2.5, "none", 50.0),
        run(3.0, "none", 30.0),
        run(2.5, "none", 9.0, **other),
        columns=("model",),
    )
    assert cell(table, "original", "model other", "words perplexity").text == "8.00"
    assert cell(table, "original", "model small", "words perplexity").text == "20.00"
    assert cell(table, "3", "model small", "words perplexity").best
    assert sum(row.original for row in table.rows) == 1


def test_a_setting_that_some_runs_lack_is_blank_in_rows_and_named_in_columns(tmp_path):
    fixed = {"config.precision": {"name": "fixed", "bits": 4}}
    runs = (run(2.5, "none", 50.0), run(4.0, "none", 22.0, **fixed))
    table = pivot(tmp_path, *runs, rows=("precision",), columns=("precision.bits",))
    assert list(dict.fromkeys(table.groups)) == ["", "no bits", "bits 4"]
    table = pivot(tmp_path, rows=("precision.bits",), columns=())
    assert [row.cells[0].text for row in table.rows] == ["original", "", "4"]
    assert table.groups == []


def test_columns_alone_make_one_row(tmp_path):
    table = pivot(tmp_path, run(2.5, "none", 5.0), run(3.0, "none", 4.0), rows=(), columns=(BITS,))
    assert len(table.rows) == 2
    assert list(dict.fromkeys(table.groups)) == ["target_bits 2.5", "target_bits 3"]


def test_rows_go_by_linear_bits_or_as_asked(tmp_path):
    runs = (run(10, "none", 5.0), run(2.5, "none", 50.0), run(3.0, "none", 60.0))
    assert [row.cells[0].text for row in pivot(tmp_path, *runs).rows[1:]] == ["2.5", "3", "10"]
    table = pivot(tmp_path, sort="perplexity.words")
    assert [row.cells[0].text for row in table.rows[1:]] == ["10", "2.5", "3"]
    table = pivot(tmp_path, sort="precision.target_bits")
    assert [row.cells[0].text for row in table.rows[1:]] == ["2.5", "3", "10"]


def test_means_over_different_machines_are_told(tmp_path):
    table = pivot(
        tmp_path,
        run(2.5, "none", 50.0, 0),
        run(2.5, "none", 51.0, 1, **{"run.device": "GPU"}),
    )
    assert "Some means are over runs that differ in device." in table.footnotes
    for number in (0, 1):
        content = json.dumps({"contents": {"calibration": f"hash {number}"}})
        (tmp_path / "name" / f"run-{number}" / "settings.json").write_text(content)
    assert "Some means are over runs that differ in inputs, device." in pivot(tmp_path).footnotes


VALUES = st.floats(1.0, 1e5).map(lambda value: round(value, 3))
DESIGNS = st.dictionaries(
    st.tuples(
        st.sampled_from([2.1, 2.5, 3]),
        st.sampled_from(["none", "fixed", "random"]),
        st.integers(0, 4),
    ),
    VALUES,
    min_size=1,
    max_size=30,
)


@settings(max_examples=40)
@given(DESIGNS)
def test_every_run_is_in_one_cell_and_means_agree_with_pandas(design):
    runs = [run(target, name, value, seed) for (target, name, seed), value in design.items()]
    with tempfile.TemporaryDirectory() as folder:
        table = pivot(Path(folder), *runs, metrics=["perplexity"])
    frame = pd.DataFrame(
        [(target, name, value) for (target, name, _), value in design.items()],
        columns=["bits", "name", "value"],
    )
    expected = frame.groupby(["bits", "name"])["value"].agg(["mean", "std", "count"])
    cells = {
        (row.cells[0].value, group.removeprefix("reservation ")): own
        for row in table.rows[1:]
        for group, label, own in zip(table.groups, table.columns, row.cells, strict=True)
        if label == "words perplexity"
    }
    filled = {place: own for place, own in cells.items() if own.value is not None}
    assert set(filled) == set(expected.index)
    assert sum(own.count for own in filled.values()) == len(runs)
    for place, own in filled.items():
        mean, std, count = expected.loc[place]
        assert own.count == count
        assert own.value == pytest.approx(mean)
        assert (own.deviation is None) if count == 1 else (own.deviation == pytest.approx(std))
    assert all(own.mark for place, own in cells.items() if place not in filled)
    total = sum(own.value * own.count for own in filled.values())
    assert total == pytest.approx(sum(design.values()))
