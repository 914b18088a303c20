"""A damaged file of a run costs a report that run at most, and never the report."""

from __future__ import annotations

import json

import damaged_runs
import pytest
from damages import started
from run_samples import RESULTS, result, write_runs

from claq_exp.run_folder.layers import LAYER_FIELDS

ROUNDS = 4
EVENTS = """\
{"time": 1, "event": "started", "run": "run", "versions": {}}
{"time": 2, "event": "stage", "stage": "load", "load": 1.5, "peak_memory_bytes": 70}
{"time": 3, "event": "layer", "name": "q_proj", "bits": 2.5, "output_error": null, "seconds": 1}
{"time": 4, "event": "block", "block": 0, "solve": 2.0}
{"time": 5, "event": "finished", "seconds": 9}
"""
LAYERS = "".join(
    ",".join(f"layers.{block}.q_proj" if field == "name" else "1" for field in LAYER_FIELDS) + "\n"
    for block in range(3)
)
GOOD = {
    "report": ("reported", "refused"),
    "again": ("found", "none", "refused"),
    "compare": ("compared", "refused"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "work").mkdir()
    write_runs(folder, result(), result({"bits.linear": 3.5}))
    for run in (folder / "name").iterdir():
        (run / "state.json").write_text('{"state": "finished"}')
        (run / "settings.json").write_text(json.dumps({"command": "", "config": RESULTS["config"]}))
        (run / "events.jsonl").write_text(EVENTS)
        (run / "layers.csv").write_text(f"{','.join(LAYER_FIELDS)}\n{LAYERS}")
    return started(damaged_runs.__file__, folder / "name", folder / "work", ROUNDS)


@pytest.mark.case(88)
@pytest.mark.parametrize("use", GOOD)
@pytest.mark.parametrize("file", damaged_runs.FILES)
def test_what_is_damaged_is_left_out_or_refused_in_one_line(file, use, cases):
    own = [case for case in cases if (case["file"], case["use"]) == (file, use)]
    assert len(own) >= 7 * ROUNDS
    assert [case for case in own if case["outcome"] not in GOOD[use]] == []
    if use == "report":  # other tokens of a run than of the rest are refused as in any report
        assert sum(case["outcome"] == "refused" for case in own) < 0.1 * len(own)
