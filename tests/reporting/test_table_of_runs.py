"""The table with a row for every run: originals, best values, gaps and their reasons."""

from __future__ import annotations

import statistics

import pytest
from run_samples import RESULTS, result, seeded, write_runs, write_state

from claq_exp.errors import ConfigError
from claq_exp.reporting.collect import collect
from claq_exp.reporting.labels import codebook_label, method_label
from claq_exp.reporting.runs_table import runs_table, unfinished_table
from claq_exp.run_folder import FAILED, RunState
from claq_exp.run_folder.jobs import Job, write_job


@pytest.fixture
def table(tmp_path):
    """Return the table of runs with these results, as a function."""

    def make(*runs, **options):
        return runs_table(collect([write_runs(tmp_path, *runs)]), "title", **options)

    return make


def texts(grid, heading) -> list[str]:
    place = grid.columns.index(heading)
    return [row.cells[place].text for row in grid.rows]


def best(grid, heading) -> list[bool]:
    place = grid.columns.index(heading)
    return [row.cells[place].best for row in grid.rows]


def perplexity(value, **more):
    return {"words": {**RESULTS["perplexity"]["words"], "quantized": value, **more}}


def test_the_original_stands_on_top_and_a_run_below_with_recipe_bits_and_measures(table):
    grid = table(result())
    assert dict(zip(grid.columns, (cell.text for cell in grid.rows[0].cells), strict=True)) == {
        "model": "small",
        "codebook": "original",
        "precision": "",
        "reservation": "",
        "solver": "",
        "linear bits": "16.00",
        "nominal bits": "16.00",
        "model bits": "16.00",
        "checkpoint, MB": "20.0",
        "words perplexity": "20.00",
        "words KL": "0.000",
        "piqa acc, %": "71.0",
        "run": "",
    }
    assert dict(zip(grid.columns, (cell.text for cell in grid.rows[1].cells), strict=True)) == {
        "model": "small",
        "codebook": "kmeans",
        "precision": "outlier_order 2.5",
        "reservation": "outlier_order 0.005",
        "solver": "gptq",
        "linear bits": "3.40",
        "nominal bits": "2.57",
        "model bits": "4.00",
        "checkpoint, MB": "5.0",
        "words perplexity": "25.25",
        "words KL": "0.123",
        "piqa acc, %": "65.5",
        "run": "run-0",
    }
    assert [row.original for row in grid.rows] == [True, False]
    assert grid.rows[1].run == "run-0"
    assert grid.columns.index("nominal bits") == grid.columns.index("linear bits") + 1


def test_each_model_has_its_original_above_its_runs_and_its_own_best(table):
    other = {"config.model.name": "other", "perplexity": perplexity(9.0, original=8.0)}
    grid = table(
        result(),
        result({"perplexity": perplexity(24.0), "bits.linear": 3.5}),
        result(other),
        result({**other, "perplexity": perplexity(8.5, original=8.0), "bits.linear": 3.6}),
    )
    assert texts(grid, "model") == ["other"] * 3 + ["small"] * 3
    assert texts(grid, "words perplexity") == ["8.00", "9.00", "8.50", "20.00", "25.25", "24.00"]
    assert best(grid, "words perplexity") == [False, False, True, False, False, True]
    assert any(note == "Bold: best of its column, per model." for note in grid.footnotes)


def test_ties_are_all_best_and_neither_bits_nor_the_original_nor_a_lone_value(table):
    grid = table(
        result({"bits.linear": 3.1}),
        result({"bits.linear": 3.2, "perplexity": perplexity(25.2512), "kl": {}}),
        result(
            {
                "bits.linear": 3.3,
                "size.checkpoint_bytes": 4_000_000,
                "perplexity": perplexity(26.0),
                "kl": {},
            }
        ),
    )
    assert best(grid, "words perplexity") == [False, True, True, False]
    assert best(grid, "words KL") == [False] * 4
    for heading in ("linear bits", "nominal bits", "model bits", "checkpoint, MB"):
        assert best(grid, heading) == [False] * 4


def test_higher_accuracy_is_better(table):
    score = {**RESULTS["zero_shot"]["piqa"], "quantized": 0.7}
    grid = table(result(), result({"zero_shot": {"piqa": score}, "bits.linear": 3.5}))
    assert best(grid, "piqa acc, %") == [False, False, True]
    assert any("up to 3.0 points" in note for note in grid.footnotes)


@pytest.mark.case(88)
def test_blank_cells_have_a_footnote_with_the_reason(table):
    grid = table(
        result({"kl": None, "bits.linear": 3.1}),
        result({"perplexity": perplexity(None), "bits.linear": 3.2}),
        result({"zero_shot": {}, "bits.linear": 3.3}),
    )
    place = {name: grid.columns.index(name) for name in ("words KL", "words perplexity")}
    task = grid.columns.index("piqa acc, %")
    rows = grid.rows[1:]
    assert [row.cells[place["words KL"]].text for row in rows] == ["", "0.123", "0.123"]
    assert [row.cells[place["words KL"]].mark for row in rows] == ["a", "", ""]
    assert [row.cells[place["words perplexity"]].mark for row in rows] == ["", "b", ""]
    assert [row.cells[task].mark for row in rows] == ["", "", "a"]
    assert grid.footnotes[:2] == ["a: not measured.", "b: not finite."]


def test_an_original_that_was_not_measured_is_blank(table):
    grid = table(result({"perplexity": perplexity(25.0, original=None)}))
    cell = grid.rows[0].cells[grid.columns.index("words perplexity")]
    assert (cell.text, cell.value, cell.mark) == ("", None, "a")


def test_the_original_comes_from_a_run_that_has_it_and_differences_are_told(table):
    grid = table(
        result({"perplexity": perplexity(25.0, original=None)}),
        result({"perplexity": perplexity(25.0, original=20.5), "bits.linear": 3.5}),
        result({"bits.linear": 3.6}),
    )
    cell = grid.rows[0].cells[grid.columns.index("words perplexity")]
    assert cell.text == "20.50"
    assert f"{cell.mark}: 20.00 to 20.50, as runs measured it." in grid.footnotes


def test_chosen_keys_are_the_first_columns(table):
    fixed = {"config.precision": {"name": "fixed", "bits": 4}, "bits.linear": 5.0}
    grid = table(result(), result(fixed), by=["precision.bits", "seed", "solver", "model", "seed"])
    assert grid.columns[:3] == ["precision.bits", "seed", "model"]
    assert texts(grid, "precision.bits") == ["", "", "4"]
    assert texts(grid, "seed") == ["", "3", "3"]
    assert grid.numeric[:3] == [True, True, False]


def test_a_key_that_no_run_has_is_refused_with_the_nearest(table):
    with pytest.raises(ConfigError, match=r"no run has a config key 'precison\.target_bits'; did"):
        table(result(), by=["precison.target_bits"])


def test_the_name_of_a_group_stands_for_its_strategy(table):
    grid = table(result(), by=["reservation"])
    assert grid.columns[0] == "model"  # a column of the recipe already
    grid = table(by=["tracking"])
    assert texts(grid, "tracking") == ["", "none"]


def test_metrics_are_chosen_by_key_or_kind_and_bits_stay(table):
    grid = table(result(), metrics=["kl"])
    assert grid.columns[5:-1] == ["linear bits", "nominal bits", "words KL"]
    grid = table(metrics=["accuracy.piqa", "time", "memory.peak", "bits.linear"])
    assert grid.columns[5:-1] == [
        "linear bits",
        "nominal bits",
        "piqa acc, %",
        "total, s",
        "load, s",
        "solve, s",
        "peak memory, GiB",
    ]
    with pytest.raises(ConfigError, match=r"measure 'perplexty' is not known; choose one of: .*kl"):
        table(metrics=["perplexty"])


def test_accuracy_has_the_average_with_it(table):
    two = {**RESULTS["zero_shot"], "arc": RESULTS["zero_shot"]["piqa"]}
    average = {"original": 0.7, "quantized": 0.655}
    grid = table(result({"zero_shot": two, "average_accuracy": average}), metrics=["accuracy"])
    assert grid.columns[7:-1] == ["piqa acc, %", "arc acc, %", "average accuracy, %"]


def test_rows_are_sorted_by_a_measure_best_first_or_by_a_setting(table):
    def run(bits, score, target):
        task = {"piqa": {**RESULTS["zero_shot"]["piqa"], "quantized": score}}
        return result(
            {"bits.linear": bits, "zero_shot": task, "config.precision.target_bits": target}
        )

    grid = table(run(3.3, 0.5, 2.1), run(3.1, 0.6, 10.5), run(3.2, None, 2.5))
    assert texts(grid, "linear bits")[1:] == ["3.10", "3.20", "3.30"]
    assert texts(table(sort="accuracy.piqa"), "linear bits")[1:] == ["3.10", "3.30", "3.20"]
    grid = table(sort="precision.target_bits")
    assert texts(grid, "linear bits")[1:] == ["3.30", "3.20", "3.10"]
    with pytest.raises(ConfigError, match="no run has a config key 'linear'"):
        table(sort="linear")


def test_rows_that_read_alike_say_in_what_they_differ(table):
    assert not any("differ in" in note for note in table(result()).footnotes)
    grid = table(result({"config.calibration.windows": 16, "bits.linear": 3.5}))
    assert (
        "Rows of the same recipe differ in calibration.windows (--by calibration.windows shows it)."
        in grid.footnotes
    )
    shown = table(by=["calibration.windows"])
    assert not any("differ in" in note for note in shown.footnotes)


def test_runs_of_other_seeds_say_that_they_can_be_merged(table):
    grid = table(seeded(0), seeded(1))
    assert any(note.endswith("(--seeds merges them).") for note in grid.footnotes)


def test_runs_that_differ_in_seeds_only_become_a_mean_with_deviation_and_number(table):
    values = [25.25, 27.0, 26.0]
    grid = table(
        *(seeded(seed, {"perplexity": perplexity(v)}) for seed, v in enumerate(values)),
        result({"config.solver.name": "nearest", "bits.linear": 3.5}),
        seeds=True,
    )
    assert grid.columns[-2:] == ["n", "run"]
    assert texts(grid, "n") == ["", "3", "1"]
    cell = grid.rows[1].cells[grid.columns.index("words perplexity")]
    assert cell.value == pytest.approx(statistics.mean(values))
    assert cell.deviation == pytest.approx(statistics.stdev(values))
    assert cell.count == 3
    assert cell.text == "26.08 ± 0.88"
    assert texts(grid, "words perplexity")[2] == "25.25"
    assert texts(grid, "linear bits") == ["16.00", "3.40", "3.50"]
    assert texts(grid, "checkpoint, MB") == ["20.0", "5.0", "5.0"]
    assert texts(grid, "run") == ["", "run-0 and 2 more", "run-3"]
    assert any("sample standard deviation" in note for note in grid.footnotes)


def test_the_same_draw_twice_is_no_second_seed(table):
    with pytest.raises(ConfigError, match=r"same settings and seeds.*leave --seeds out"):
        table(seeded(1), seeded(1, {"config.name": "again"}), seeds=True)


def test_a_seed_that_diverged_is_told_and_its_row_is_never_best(table):
    grid = table(
        seeded(0, {"perplexity": perplexity(21.0)}),
        seeded(1, {"perplexity": perplexity(21.5)}),
        seeded(2, {"perplexity": perplexity(None)}),
        result({"config.solver.name": "nearest", "bits.linear": 3.5}),
        result({"config.solver.name": "other", "bits.linear": 3.6}),
        seeds=True,
    )
    cell = grid.rows[1].cells[grid.columns.index("words perplexity")]
    assert cell.text == "21.25 ± 0.35 (n=2)"
    assert f"{cell.mark}: not finite in 1 of 3 runs, left out." in grid.footnotes
    assert best(grid, "words perplexity") == [False, False, True, True]


@pytest.mark.case(93)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perplexity.words.tokens_sha256": "bb"}, "measured 'words' on different tokens"),
        ({"perplexity.words.tokens": 7}, "measured 'words' on different tokens"),
        ({"kl.words.tokens": 8_176}, "measured the KL on 'words' on different tokens"),
        ({"zero_shot.piqa.rows": 100}, "scored 'piqa' on different questions"),
        ({"zero_shot.piqa.requests_sha256": "ee"}, "scored 'piqa' on different questions"),
        ({"zero_shot.piqa.metric": "acc_norm"}, "scored 'piqa' on different questions"),
    ],
    ids=["tokens", "number", "kl", "rows", "requests", "metric"],
)
def test_numbers_that_do_not_compare_are_refused(change, message, table):
    with pytest.raises(ConfigError, match=f"runs of small {message}.*run-0.*run-1"):
        table(result(), result(change))
    assert table(metrics=["size"]).columns[-2] == "checkpoint, MB"  # left out, the rest is there


def test_averages_over_different_tasks_are_refused(table):
    two = {**RESULTS["zero_shot"], "arc": RESULTS["zero_shot"]["piqa"]}
    three = {**two, "boolq": RESULTS["zero_shot"]["piqa"]}
    average = {"original": 0.7, "quantized": 0.655}
    with pytest.raises(ConfigError, match="averaged accuracy over different tasks"):
        table(
            result({"zero_shot": two, "average_accuracy": average}),
            result({"zero_shot": three, "average_accuracy": average}),
        )


def test_other_models_may_have_other_tokens(table):
    grid = table(
        result(), result({"config.model.name": "other", "perplexity.words.tokens_sha256": "bb"})
    )
    assert len(grid.rows) == 4


def test_results_without_a_hash_compare_by_amount_and_that_is_told(table):
    def change(hash_):
        return {"perplexity.words.tokens_sha256": hash_}

    grid = table(result(change(None)), result())
    assert any("only its amount is known" in note for note in grid.footnotes)
    with pytest.raises(ConfigError, match="'words' on different tokens"):
        table(result(change("bb")))  # the one without a hash comes first and agrees with both


def test_remarks_on_weights_and_overlaps_are_footnotes(table):
    grid = table(
        result({"config.model.remark": "rounded before", "perplexity.words.overlap": 0.05})
    )
    assert "small: rounded before." in grid.footnotes
    assert any(note.startswith("5.0 % of the tokens of words") for note in grid.footnotes)


def test_runs_with_fallbacks_are_a_footnote(table):
    runs = [seeded(seed, {"fallbacks": {"more_damping": seed}}) for seed in range(3)]
    assert any(note.startswith("In 2 of 3 runs some layers") for note in table(*runs).footnotes)


def test_an_embedding_that_stays_in_16_bits_is_a_footnote(table):
    run = seeded(0, {"fallbacks": {"more_damping": 0, "embedding": "the head is odd; it stays"}})
    grid = table(run, seeded(1))
    assert "the head is odd; it stays." in grid.footnotes
    assert not any("some layers" in note for note in grid.footnotes)


def test_without_fallbacks_there_is_no_footnote_of_them(table):
    grid = table(seeded(0, {"fallbacks": {"more_damping": 0}}), seeded(1))
    assert not any("fallback" in note for note in grid.footnotes)


def test_without_a_finished_run_the_refusal_says_what_there_is(tmp_path):
    write_state(tmp_path / "a" / "one", {"state": "failed", "reason": "no memory"})
    write_state(tmp_path / "a" / "two", {"state": "interrupted"})
    with pytest.raises(
        ConfigError,
        match=r"no finished run \(1 failed, 1 interrupted\), the first is one, failed: no memory",
    ):
        runs_table(collect([tmp_path]), "title")


def test_runs_without_results_are_listed_with_state_and_reason(tmp_path):
    write_runs(tmp_path, result())
    assert unfinished_table(collect([tmp_path])) is None
    write_state(tmp_path / "a" / "one", {"state": "failed", "reason": "no memory"})
    write_state(tmp_path / "a" / "two", {"state": "running", "process": "process 1 on vm"})
    grid = unfinished_table(collect([tmp_path]))
    assert [[cell.text for cell in row.cells] for row in grid.rows] == [
        ["one", "failed", "no memory"],
        ["two", "killed", "process 1 on vm"],
    ]


def test_jobs_without_a_folder_go_by_what_tells_them_apart(tmp_path):
    words = ("model=hf", "seed=0", "budget.bits=1")
    write_job(tmp_path / "a", Job(0, words, RunState(FAILED, "x")))
    assert unfinished_table(collect([tmp_path])).rows[0].cells[0].text == " ".join(words)
    write_job(tmp_path / "a", Job(1, ("model=hf", "seed=1", "budget.bits=1"), RunState(FAILED)))

    def names():
        return [row.cells[0].text for row in unfinished_table(collect([tmp_path])).rows]

    assert names() == ["seed=0", "seed=1"]
    write_runs(tmp_path, result({"config.budget": {"bits": 2}}))
    assert names() == ["seed=0 budget.bits=1", "seed=1 budget.bits=1"]


def test_huge_and_tiny_values_stay_readable(table):
    grid = table(
        result({"perplexity": perplexity(1.25e9), "kl": {"words": {"mean": 0.00012, "tokens": 1}}})
    )
    assert texts(grid, "words perplexity")[1] == "1.25e+09"
    assert texts(grid, "words KL")[1] == "0.00012"


LO_BCQ = {
    "name": "lo_bcq",
    "bits": 4,
    "array": 64,
    "codebooks": 8,
    "books": "local",
    "scope": "token",
}


def test_where_a_run_rounds_activations_all_show_what_to_and_its_bits(table):
    plain = result()
    rounded = result({"config.activation": LO_BCQ, "bits.activation": 4.54})
    integers = {"name": "int", "bits": 8, "group_size": 0, "scope": "static"}
    others = result({"config.activation": integers, "bits.activation": 8.0, "bits.linear": 5.0})
    grid = table(plain, rounded, others)
    assert texts(grid, "activation") == ["", "none", "lo_bcq 64/8 local", "int 8 static"]
    assert texts(grid, "activation bits") == ["16.00", "16.00", "4.54", "8.00"]


@pytest.mark.parametrize(
    ("codebook", "label"),
    [
        ({"name": "lo_bcq", "array": 128, "codebooks": 16, "books": "universal"}, "lo_bcq 128/16"),
        ({**LO_BCQ, "codeword_bits": 8, "books": "/a/b.json"}, "lo_bcq 64/8 INT8 file"),
        ({"name": "uniform", "group_size": 64}, "uniform g64"),
        ({"name": "uniform", "zero_point": "real", "clip": "search"}, "uniform real zeros sought"),
        ({"name": "group_table", "group_size": 32, "scale_bits": 16}, "group_table g32"),
        ({"name": "group_table", "group_size": 64, "scale_bits": 6}, "group_table g64 scales 6"),
        ({"name": "nvfp4", "array": 16}, "nvfp4"),
    ],
)
def test_a_codebook_is_named_with_its_sizes(codebook, label):
    assert codebook_label(codebook) == label


def test_a_line_of_a_plot_names_the_activations():
    assert method_label(
        result({"config.activation": {"name": "mxfp4", "array": 32}})["config"]
    ) == ("kmeans + AP outlier_order + OR outlier_order 0.005 + A mxfp4")
