"""Whole runs on a device that is not the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pretend_device
import pytest

from claq_exp.cli import main
from claq_exp.quantize.kernels import column_step


def only_run(outputs: Path) -> Path:
    (results,) = outputs.rglob("results.json")
    return results.parent


@pytest.fixture
def kernels(monkeypatch) -> pretend_device.interpreted:
    kernel = pretend_device.interpreted(column_step.quantize_column)
    monkeypatch.setattr(column_step, "quantize_column", kernel)
    return kernel


def test_run(tiny_run, tmp_path, pretend, kernels):
    with pretend_device.traffic() as seen:
        assert main([*tiny_run, f"device={pretend}", "experiment=kmeans_2bit"]) == 0
    print(seen)
    results = json.loads((only_run(tmp_path) / "results.json").read_text())
    print(results["perplexity"], kernels.launches, results["run"]["device"])
    assert 0
