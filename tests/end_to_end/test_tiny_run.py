"""The command line on a tiny model, from config to results."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import claq_exp
from claq_exp.cli import main


def only_run(outputs: Path) -> Path:
    (results,) = outputs.rglob("results.json")
    return results.parent


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def test_run_leaves_results_layers_events_and_a_checkpoint(tiny_run, outputs, drawn, capfd):
    assert main(tiny_run) == 0
    folder = only_run(outputs)
    results = json.loads((folder / "results.json").read_text())
    assert results["schema"] == 1
    assert results["status"] == "finished"
    assert results["perplexity"]["wikipedia"]["tokens"] == 6 * 63
    assert math.isfinite(results["perplexity"]["wikipedia"]["original"])
    assert results["bits"]["nominal"] < results["bits"]["linear"] < results["bits"]["model"]
    assert set(results["timings"]) == {
        "load",
        "gradients",
        "allocate",
        "transform",
        "activations",
        "calibrate",
        "hessian",
        "solve",
        "tune",
        "export",
        "evaluate",
    }
    assert results["timings"]["solve"] > 0
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 7 + 1
    assert {row["block"] for row in rows} == {"0", "1", "2", ""}
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "started"
    assert events[-1]["event"] == "finished"
    assert sum(event["event"] == "layer" for event in events) == 22
    assert (folder / "layers.png").read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "work").exists()
    assert "linear bits per weight" in capfd.readouterr().out


def test_same_command_finds_the_finished_run(tiny_run, outputs, capfd):
    words = [*tiny_run, "device=cpu"]
    assert main(words) == 0
    before = (only_run(outputs) / "results.json").read_bytes()
    assert main([*words, "model.dtype=float32"]) == 0  # what auto is on a CPU
    assert (only_run(outputs) / "results.json").read_bytes() == before
    assert "finished before" in capfd.readouterr().out


def test_reported_perplexity_is_that_of_the_checkpoint_on_disk(tiny_run, outputs, text_file):
    assert main(tiny_run) == 0
    folder = only_run(outputs)
    model = claq_exp.load(folder / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    tokens = torch.tensor(tokenizer(text_file.read_text()).input_ids[: 6 * 64]).reshape(6, 64)
    total = 0.0
    with torch.inference_mode():
        for window in tokens:
            log_probability = model(window[None]).logits[0, :-1].double().log_softmax(-1)
            total -= log_probability.gather(1, window[1:, None]).sum().item()
    expected = math.exp(total / (6 * 63))
    results = json.loads((folder / "results.json").read_text())
    assert results["perplexity"]["wikipedia"]["quantized"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        ["experiment=claq_2.12"],
        ["experiment=rtn_4bit"],
        ["experiment=svid_1bit"],
        ["experiment=gptq_4bit_g64", "codebook.group_size=32"],
        ["experiment=kmeans_3bit"],
        ["experiment=kmeans_3bit", "codebook=row_kmeans"],
        ["reservation=fixed", "solver=nearest"],
    ],
    ids=" ".join,
)
def test_every_recipe_runs(recipe, tiny_run, outputs):
    assert main([*tiny_run, *recipe]) == 0
    results = json.loads((only_run(outputs) / "results.json").read_text())
    assert results["bits"]["linear"] < 16


def test_evaluate_measures_the_same_perplexity_again(tiny_run, outputs, capfd):
    assert main(tiny_run) == 0
    folder = only_run(outputs)
    expected = json.loads((folder / "results.json").read_text())["perplexity"]["wikipedia"]
    capfd.readouterr()
    assert main(["evaluate", *tiny_run, f"checkpoint={folder / 'checkpoint'}", "name=again"]) == 0
    again = json.loads((only_run(outputs / "again") / "results.json").read_text())
    measured = again["perplexity"]["wikipedia"]
    assert measured["quantized"] == pytest.approx(expected["quantized"], rel=1e-6)
    assert measured["tokens_sha256"] == expected["tokens_sha256"]


def test_a_grid_runs_every_combination_and_reports(tiny_run, outputs, capfd):
    grid = ["precision.target_bits=2.5,3.5", "reservation=none,outlier_order", "-m"]
    assert main([*tiny_run, *grid]) == 0
    assert len(list(outputs.rglob("results.json"))) == 4
    capfd.readouterr()
    assert main(["report", str(outputs), "--by", "precision.target_bits"]) == 0
    table = (outputs / "report.md").read_text()
    assert table.count("| kmeans |") == 4
    assert (outputs / "report.csv").read_text().startswith("precision.target_bits,")
    assert (outputs / "pictures" / "wikipedia_perplexity.png").stat().st_size > 5000


def test_plan_agrees_with_the_run(tiny_run, outputs, capfd):
    assert main(tiny_run) == 0
    results = json.loads((only_run(outputs) / "results.json").read_text())
    capfd.readouterr()
    assert main(["plan", *tiny_run]) == 0
    printed = capfd.readouterr().out
    assert f"{results['bits']['nominal']:.3f}" in printed


@pytest.mark.case(45)
@pytest.mark.parametrize(("kind", "bits"), [("linear", 13.0), ("nominal", 2.3)])
def test_a_budget_is_kept_by_what_is_on_disk(kind, bits, tiny_run, outputs):
    words = [f"budget.bits={bits}", f"budget.kind={kind}"]
    assert main([*tiny_run, *words]) == 0
    results = json.loads((only_run(outputs) / "results.json").read_text())
    assert 0.9 * bits < results["bits"][kind] <= bits
    assert results["config"]["budget"] == {"bits": bits, "kind": kind}


@pytest.mark.case(41)
def test_an_impossible_budget_is_refused_before_any_work(tiny_run, outputs, capfd):
    assert main([*tiny_run, "budget.bits=1.5"]) == 2
    error = capfd.readouterr().err
    assert "cannot be met; this recipe reaches from" in error
    assert not list(outputs.rglob("work"))


@pytest.mark.parametrize("kind", ["linear", "nominal", "model"])
def test_a_budget_below_what_an_allocation_can_reach_is_refused_before_its_survey(
    kind, tiny_run, outputs, capfd
):
    words = ["allocation=rate_distortion", "budget.bits=0.5", f"budget.kind={kind}"]
    assert main([*tiny_run, *words]) == 2
    assert "cannot be met" in capfd.readouterr().err
    assert not list(outputs.rglob("work"))


def test_an_asymmetric_solver_goes_with_an_allocation_and_all_that_changes_a_block(
    tiny_run, outputs
):
    """The plan is made on the original alone; the solver is told of both models."""
    words = ["allocation=rate_distortion", "allocation.target_bits=9", "solver.asymmetric=0.5"]
    assert main([*tiny_run, *words, "transform=smooth", "tune=norms", "tune.steps=1"]) == 0
    folder = only_run(outputs)
    assert "gptq_asymmetric0.5" in folder.name
    results = json.loads((folder / "results.json").read_text())
    assert math.isfinite(results["perplexity"]["wikipedia"]["quantized"])
    assert results["config"]["solver"]["asymmetric"] == 0.5
