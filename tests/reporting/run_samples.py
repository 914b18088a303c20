"""Results of runs as they stand on disk, for the tests of reports."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

RESULTS: dict[str, Any] = {
    "schema": 1,
    "status": "finished",
    "run": {
        "id": "default-1234abcd",
        "hash": "1234abcd",
        "seconds": 60.0,
        "versions": {"python": "3.11"},
        "device": "CPU",
        "git": "abc",
    },
    "config": {
        "model": {"name": "small", "remark": ""},
        "calibration": {"seed": 3, "windows": 8},
        "codebook": {"name": "kmeans"},
        "precision": {"name": "outlier_order", "target_bits": 2.5},
        "reservation": {"name": "outlier_order", "ratio": 0.005},
        "solver": {"name": "gptq"},
        "tracking": {"name": "none", "project": "claq_exp"},
        "name": "default",
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
    "kl": {"words": {"mean": 0.12345, "top1_agreement": 0.9, "tokens": 4_088}},
    "zero_shot": {
        "piqa": {
            "metric": "acc",
            "original": 0.71,
            "quantized": 0.655,
            "stderr": 0.03,
            "rows": 200,
            "shots": 0,
            "metrics": {"acc": 0.655, "acc_norm": None},
            "requests_sha256": "dd",
        }
    },
    "average_accuracy": None,
    "timings": {"load": 1.5, "solve": 20.0},
    "peak_memory_bytes": 2**30,
}


def result(changes: dict[str, Any] | None = None) -> dict[str, Any]:
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


def seeded(seed: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run of another seed, which the calibration follows."""
    return result({"config.seed": seed, "config.calibration.seed": seed, **(changes or {})})


def write_runs(folder: Path, *runs: dict[str, Any]) -> Path:
    """Write results into run folders below `folder/name`, and return the folder."""
    below = folder / "name"
    before = len(list(below.iterdir())) if below.is_dir() else 0
    for number, results in enumerate(runs, start=before):
        run = below / f"run-{number}"
        run.mkdir(parents=True)
        (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def write_state(folder: Path, state: dict[str, str], config: dict[str, Any] | None = None) -> Path:
    """Write a run folder without results."""
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    if config is not None:
        (folder / "settings.json").write_text(json.dumps({"config": config}), encoding="utf-8")
    return folder
