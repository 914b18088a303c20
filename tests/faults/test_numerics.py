"""Models with broken or extreme numbers, from the command line to the table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama

from claq_exp.cli import main

BLOCK = "model.layers.1"
ATTENTION = [f"{BLOCK}.self_attn.{part}_proj" for part in "qkv"]


@pytest.fixture
def run(tiny_run, tmp_path, capfd):
    """Run on a tiny model with a change of its weights: (exit code, output, errors, rows)."""

    def run(damage: Callable[[dict[str, torch.Tensor]], None], *more: str):
        folder = tmp_path / "damaged"
        model = tiny_llama()
        with torch.no_grad():
            damage(dict(model.named_parameters()))
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        words = ["calibration.windows=4", "evaluation.corpora.wikipedia.windows=2", "threads=1"]
        code = main([*tiny_run, f"model.source={folder}", *words, *more])
        told = capfd.readouterr()
        rows: dict[str, dict[str, str]] = {}
        for file in (tmp_path / "outputs").rglob("layers.csv"):
            with file.open() as text:
                rows = {row["name"]: row for row in csv.DictReader(text)}
        return code, told.out, told.err, rows

    return run


def results(tmp_path: Path) -> dict:
    (file,) = (tmp_path / "outputs").rglob("results.json")
    return json.loads(file.read_text())


def nothing(_: dict[str, torch.Tensor]) -> None:
    pass


def dead_inputs(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{BLOCK}.input_layernorm.weight"][[3, 11]] = 0


def unfed(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{BLOCK}.input_layernorm.weight"].zero_()


def duplicated_inputs(weights: dict[str, torch.Tensor]) -> None:
    rows = weights[f"{BLOCK}.mlp.up_proj.weight"], weights[f"{BLOCK}.mlp.gate_proj.weight"]
    for weight in rows:  # inputs of down_proj come in equal pairs
        weight[36:] = weight[:36]


def huge_inputs(weights: dict[str, torch.Tensor]) -> None:
    weights[f"{BLOCK}.input_layernorm.weight"].fill_(6e4)  # products pass the largest float16


def extreme_matrices(weights: dict[str, torch.Tensor]) -> None:
    query, key, value = (weights[f"{name}.weight"] for name in ATTENTION)
    query.zero_()
    key[:, 5] = 0.25
    value.copy_(torch.sign(value))  # two values for eight levels
    weights[f"{BLOCK}.mlp.down_proj.weight"][7, 2] = 6e4


@pytest.mark.case(22, 26, 27, 28)
@pytest.mark.parametrize("damage", [duplicated_inputs, huge_inputs, extreme_matrices])
def test_extreme_numbers_give_a_finite_model_and_no_fallback(damage, run, tmp_path):
    code, out, err, rows = run(damage, "strict=true")
    assert code == 0, err
    assert "fallback" not in out
    found = results(tmp_path)
    assert not any(found["fallbacks"].values())
    assert math.isfinite(found["perplexity"]["wikipedia"]["quantized"])
    assert all(0 <= float(row["output_error"]) < 1 for row in rows.values())
    if damage is extreme_matrices:
        query, key, value = (rows[name] for name in ATTENTION)
        assert float(query["weight_error"]) == 0
        assert float(value["weight_error"]) < float(key["weight_error"])


@pytest.mark.case(21)
def test_dead_inputs_are_counted_in_every_place_that_a_reader_looks(run, tmp_path):
    code, out, err, rows = run(dead_inputs)
    assert code == 0, err
    dead = {name: row["dead_columns"] for name, row in rows.items() if row["dead_columns"] != "0"}
    assert dead == dict.fromkeys(ATTENTION, "2")
    fallbacks = {key: count for key, count in results(tmp_path)["fallbacks"].items() if count}
    assert fallbacks == {"layers": 3, "layers_with_dead_columns": 3}
    assert "Note: 3 layers had inputs that were zero on every calibration token" in out
    (line,) = (line for line in out.splitlines() if "layers with a fallback" in line)
    assert line.split()[-2] == "3"
    events = next((tmp_path / "outputs").rglob("events.jsonl")).read_text().splitlines()
    (event,) = (e for e in map(json.loads, events) if e["event"] == "fallbacks")
    assert event["layers_with_dead_columns"] == 3
    assert rows[ATTENTION[0]]["nearest"] == rows[ATTENTION[0]]["raised_damping"] == ""


@pytest.mark.case(20)
def test_layers_that_get_zeros_only_are_rounded_to_nearest_and_told(run, tmp_path):
    code, out, err, rows = run(unfed)
    assert code == 0, err
    nearest = {name: row["nearest"] for name, row in rows.items() if row["nearest"]}
    assert nearest == {  # without values, attention puts out nothing
        **dict.fromkeys(ATTENTION, "unfed"),
        f"{BLOCK}.self_attn.o_proj": "unfed",
    }
    assert results(tmp_path)["fallbacks"]["layers_unfed"] == 4
    assert "Note: 4 layers got no input, or zeros only, and fell back to round-to-nearest" in out
    assert math.isfinite(results(tmp_path)["perplexity"]["wikipedia"]["quantized"])


@pytest.mark.case(20, 21, 22)
@pytest.mark.parametrize(
    ("damage", "words", "layer", "what"),
    [
        (dead_inputs, [], ATTENTION[0], "had inputs that were zero on every calibration token"),
        (unfed, [], ATTENTION[0], "got no input, or zeros only"),
        (
            nothing,
            ["calibration.windows=1", "calibration.batch_size=1"],
            "model.layers.0.mlp.down_proj",
            "saw fewer calibration tokens than there are inputs (tokens: 64)",
        ),
    ],
)
def test_strict_refuses_the_first_layer_with_a_fallback(damage, words, layer, what, run, tmp_path):
    code, _, err, rows = run(damage, "strict=true", *words)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"claq-exp: {layer}: strict=true, and this layer {what}")
    assert not rows
    assert not list((tmp_path / "outputs").rglob("results.json"))


def test_strict_is_part_of_what_a_run_is(run, tmp_path):
    assert run(nothing)[0] == 0
    assert run(nothing, "strict=true")[0] == 0
    assert len(list((tmp_path / "outputs").rglob("results.json"))) == 2
