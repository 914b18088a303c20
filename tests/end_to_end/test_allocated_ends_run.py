"""Runs whose head competes for the bits of the whole checkpoint."""

from __future__ import annotations

import csv
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import claq_exp
import claq_exp.allocate.model as allocating
from claq_exp.checkpoint.reader import read_layouts
from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.models.ends import is_end
from claq_exp.run import assist, job
from claq_exp.run.ends import OwnEnds
from claq_exp.run.plan import plan_for

TOKENS = torch.arange(40).reshape(2, 20)
SMALL = ["calibration.windows=4", "evaluation.corpora.wikipedia.windows=2", "threads=1"]
ALLOCATED = [
    "allocation=rate_distortion",
    "allocation.windows=2",
    "embedding=allocated",
    "budget.kind=model",
]


@pytest.fixture
def run(tiny_run, tmp_path):
    """Runs an experiment; returns its folder and results."""

    def started(*words: str, outputs: str = "outputs") -> tuple[Path, dict]:
        place = tmp_path / outputs
        assert main([*tiny_run, *SMALL, *ALLOCATED, f"outputs={place}", *words]) == 0
        (results,) = place.rglob("results.json")
        return results.parent, json.loads(results.read_text())

    return started


@pytest.mark.parametrize("bits", [10.0, 11.5])
def test_a_tied_matrix_shares_the_budget_of_the_checkpoint(bits, run, tiny_run, capsys):
    words = [f"budget.bits={bits}"]
    plan = plan_for(compose_config([*tiny_run, *SMALL, *ALLOCATED, *words]), "cpu")
    folder, results = run(*words)
    assert bits * 0.9 < results["bits"]["model"] <= bits  # headers are estimated, rather too many
    assert plan.sizes.model == pytest.approx(results["bits"]["model"], rel=0.1)
    assert plan.sizes.model <= bits
    layouts = read_layouts(folder / "checkpoint")
    assert {name for name in layouts if is_end(name)} == {"model.embed_tokens"}
    assert len(layouts["model.embed_tokens"].widths()) > 1  # columns are not alike
    stored = layouts["model.embed_tokens"].ledger().total
    assert results["bits"]["ledger"]["embedding"] == stored
    rows = list(csv.DictReader((folder / "layers.csv").open()))
    assert rows[-1]["name"] == "model.embed_tokens"
    with torch.inference_mode():
        packed = claq_exp.load(folder / "checkpoint")(TOKENS).logits
        dense = claq_exp.load(folder / "checkpoint", kernel="dense")(TOKENS).logits
    torch.testing.assert_close(packed, dense, rtol=1e-3, atol=1e-3)
    assert "e_allocated" in folder.name
    capsys.readouterr()
    assert main(["inspect", str(folder), "--layers"]) == 0
    assert "256 x 48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["embedding.looked_up_bits=5"], {"model.embed_tokens": {5}, "lm_head": None}),
        (["embedding=none", "head=allocated"], {"lm_head": None}),
    ],
    ids=["both", "head alone"],
)
def test_an_embedding_of_its_own_has_fixed_bits(words, kinds, untied, run):
    folder, results = run(f"model.source={untied}", "budget.bits=10", *words)
    assert 9 < results["bits"]["model"] <= 10
    ends = {n: x for n, x in read_layouts(folder / "checkpoint").items() if is_end(n)}
    assert ends.keys() == kinds.keys()
    for name, widths in kinds.items():
        assert widths is None or set(ends[name].widths()) == widths
    with torch.inference_mode():
        assert claq_exp.load(folder / "checkpoint")(TOKENS).logits.isfinite().all()


def test_the_surveyed_model_is_gone_before_blocks_are_quantized(run, monkeypatch):
    allocate, quantize, models = allocating.allocate_model, assist.quantize_model, []

    def watched(model, *arguments, **options):
        models.append(weakref.ref(model))
        return allocate(model, *arguments, **options)

    def checked(*arguments, **options):
        assert [model() for model in models] == [None]
        return quantize(*arguments, **options)

    monkeypatch.setattr(job, "allocate_model", watched)
    monkeypatch.setattr(assist, "quantize_model", checked)
    gc.disable()  # nothing but the run itself may collect it
    try:
        run("budget.bits=10")
    finally:
        gc.enable()


def test_a_run_that_ends_before_its_head_goes_on_to_the_same_bytes(
    run, tiny_run, tmp_path, monkeypatch
):
    expected, _ = run("budget.bits=10", outputs="undisturbed")

    def ended(*_, **__):
        raise OSError("the machine is gone")

    words = [*tiny_run, *SMALL, *ALLOCATED, "budget.bits=10", f"outputs={tmp_path / 'again'}"]
    with monkeypatch.context() as patch:
        patch.setattr(OwnEnds, "head", ended)
        assert main(words) == 1
    folder, _ = run("budget.bits=10", "resume=required", outputs="again")
    ours, theirs = (load_file(f / "checkpoint/model.safetensors") for f in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    events = [json.loads(line) for line in (folder / "events.jsonl").open()]
    assert [event.get("stage") for event in events].count("allocate") == 1
    (end,) = (event for event in events if event.get("stage") == "embedding")
    assert end["peak_memory_bytes"] > 0
