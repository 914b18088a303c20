"""A mixture of experts from the command line: plan, run, and what is said of idle experts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from claq_exp.cli import main
from claq_exp.runtime.linear import quantized_linears


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Folder of a tiny Mixtral in the hub's layout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 256}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 6}
    folder = tmp_path_factory.mktemp("models") / "mixture"
    MixtralForCausalLM(MixtralConfig(**sizes, dtype=torch.float16)).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_mixture_runs_and_tells_of_experts_that_saw_few_tokens(
    tiny_run, mixture, tmp_path, capfd
):
    words = [*tiny_run, f"model.source={mixture}", "calibration.windows=2", "calibration.seqlen=32"]
    assert main(["plan", *words]) == 0
    assert main(words) == 0
    (folder,) = (path.parent for path in (tmp_path / "outputs").rglob("results.json"))
    with (folder / "layers.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["block"]]  # without the embedding
    assert len(rows) == 2 * (4 + 6 * 3)
    sent = [int(row["tokens"]) for row in rows if ".experts." in row["name"]]
    assert sum(sent) == 2 * 3 * 2 * 64  # blocks, layers of an expert, experts of a token, tokens
    few = sum(int(row["tokens"]) < int(row["cols"]) for row in rows)
    assert few >= sum(count < 48 for count in sent) > 0
    results = json.loads((folder / "results.json").read_text())
    assert results["fallbacks"]["layers_with_few_tokens"] == few
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (event,) = (event for event in events if event["event"] == "fallbacks")
    assert event["layers_with_few_tokens"] == few
    assert event["layers_unfed"] == sum(count == 0 for count in sent)
    assert f"{few} layers saw fewer calibration tokens" in capfd.readouterr().out
    assert main(["inspect", str(folder)]) == 0
    assert main(["export", str(folder), str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert type(plain.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    loaded = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    assert len(quantized_linears(loaded)) == len(rows) + 1  # and the head
    assert loaded.model.layers[0].mlp.gate.weight.ndim == 2
