"""In a sweep, each job is a W&B run of its own, with its own config, in the sweep's group."""

from __future__ import annotations

import json

import pytest
from wandb_files import records

from claq_exp.cli import main


@pytest.mark.case(96)
@pytest.mark.parametrize(
    ("more", "group"), [([], "pair"), (["tracking.group=mine"], "mine")], ids=["sweep", "own"]
)
def test_two_jobs_are_two_runs_of_one_group_with_their_own_configs(
    more, group, tiny_run, tmp_path, monkeypatch
):
    for name in ("WANDB_MODE", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    words = [word for word in tiny_run if not word.startswith("tracking=")]
    words += ["tracking=wandb", "experiment=rtn_4bit", "threads=1", "name=pair", *more]
    assert main(["-m", *words, "~evaluation.corpora.wikipedia", "seed=3,4"]) == 0
    runs = {}
    for path in (tmp_path / "outputs/pair").glob("*/wandb/offline-run-*/run-*.wandb"):
        (run,) = [r.run for r in records(path) if r.WhichOneof("record_type") == "run"]
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        runs[run.run_id] = (run.run_group, config["seed"], config["calibration"]["seed"])
    assert sorted(runs.values()) == [(group, 3, 3), (group, 4, 4)]
