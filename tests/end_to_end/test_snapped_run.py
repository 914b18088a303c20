"""A run whose columns take their levels from one set."""

from __future__ import annotations

import json

import pytest

from claq_exp.cli import main
from claq_exp.payload.snapped_codebooks import SnappedCodebooksLayout

ALLOCATED = "allocation=rate_distortion allocation.codebooks=own precision=none reservation=none"
FIXED = "precision=fixed precision.bits=4"


@pytest.mark.parametrize("words", [FIXED, f"{ALLOCATED} budget.bits=7"])
def test_a_run_stores_and_measures_them(words, tiny_run, tmp_path):
    assert main([*tiny_run, *words.split(), "codebook.snap=grid"]) == 0
    (path,) = tmp_path.rglob("results.json")
    assert json.loads(path.read_text())["perplexity"]["wikipedia"]["quantized"]
    (config,) = tmp_path.rglob("checkpoint/config.json")
    layouts = json.loads(config.read_text())["quantization_config"]["modules"].values()
    assert SnappedCodebooksLayout.kind in {layout["kind"] for layout in layouts}
