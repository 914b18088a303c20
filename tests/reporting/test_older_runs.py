"""Runs of older versions are reported in the words of today, beside those of today."""

from __future__ import annotations

import pytest
from run_samples import result, write_runs

from claq_exp.cli import main
from claq_exp.reporting.collect import collect
from claq_exp.reporting.labels import families_of, method_label, recipe_labels
from claq_exp.reporting.older import current
from claq_exp.reporting.overrides import agree
from claq_exp.reporting.settings import differing

FIELDS = {"target_bits": 2.6, "count": "linear", "importance": "fisher", "windows": 8}
SHARES = {"small": 0.0025, "large": 0.01}
OLD = {
    "config.precision": {"name": "rate_distortion", **FIELDS},
    "config.reservation": {"name": "rate_distortion", **SHARES},
    "config.budget": {"bits": 2.6, "kind": "linear"},
}
NEW = {
    "config.precision": {"name": "none"},
    "config.reservation": {"name": "none"},
    "config.allocation": {"name": "rate_distortion", **FIELDS, "reserve": True, **SHARES},
    "config.budget": {"bits": 2.6, "kind": "linear"},
}


@pytest.fixture
def runs(tmp_path):
    plain = result({"config.budget": {"bits": None, "kind": "linear"}})
    folder = write_runs(tmp_path, result(OLD), result({**NEW, "bits.linear": 3.5}), plain)
    return collect([folder]).runs


def test_an_allocation_of_old_is_an_allocation(runs):
    old, new = (run for run in runs if run.config["allocation"]["name"] != "none")
    assert old.config == new.config
    assert differing([old, new]) == []
    families = families_of(run.config for run in runs)
    assert recipe_labels(old.config, families) == {
        "codebook": "kmeans",
        "precision": "none",
        "reservation": "none",
        "solver": "gptq",
        "allocation": "rate_distortion, 2.6 linear",
    }
    assert method_label(old.config) == "kmeans + rate_distortion"


def test_without_outliers_it_did_not_reserve():
    found = current({**result(OLD)["config"], "reservation": {"name": "none"}})
    assert found["allocation"] == {"name": "rate_distortion", **FIELDS, "reserve": False, **SHARES}


def test_gptq_of_old_was_not_asymmetric(tmp_path):
    new = result({"config.solver": {"name": "gptq", "damping": 0.01, "asymmetric": 0.0}})
    old = result({"config.solver": {"name": "gptq", "damping": 0.01}})
    found = collect([write_runs(tmp_path, new, old)]).runs
    assert differing(found) == []
    asymmetric = {**found[0].config, "solver": {"name": "gptq", "asymmetric": 0.5}}
    assert method_label(asymmetric).startswith("kmeans + asymmetric 0.5 + ")
    assert recipe_labels(asymmetric)["solver"] == "gptq asymmetric 0.5"


@pytest.mark.parametrize("config", [{}, {"precision": 3}, {"precision": {}, "reservation": None}])
def test_damaged_settings_stay_as_they_are(config):
    assert current(config) == config


def test_tables_without_an_allocation_have_no_column_for_it(tmp_path):
    runs = collect([write_runs(tmp_path, result())]).runs
    assert "allocation" not in families_of(run.config for run in runs)


def test_a_folder_of_both_is_reported(tmp_path):
    write_runs(tmp_path, result(OLD), result({**NEW, "bits.linear": 3.5}), result())
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.count("rate_distortion, 2.6 linear") == 2


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["precision=rate_distortion", "precision.target_bits=2.6"], True),
        (["precision=rate_distortion", "reservation=rate_distortion"], True),
        (["precision=rate_distortion", "precision.target_bits=2.3"], False),
        (["precision=fixed"], False),
        (["allocation=rate_distortion"], True),
    ],
)
def test_overrides_of_old_agree_with_the_settings_that_they_made(words, same):
    assert agree(words, current(result(OLD)["config"])) is same
