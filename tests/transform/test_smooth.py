"""SmoothQuant: its scales, and runs that use it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from quantized_models import opened
from tiny_architectures import ARCHITECTURES, saved, token_batches

from claq_exp.checkpoint.reader import load_model
from claq_exp.cli import main
from claq_exp.errors import ConfigError
from claq_exp.models.blocks import capture_inputs, run_block
from claq_exp.models.load import open_model
from claq_exp.models.stream import WholeModel
from claq_exp.quantize.codebook import Uniform
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Nearest
from claq_exp.run.quantize import quantize_model
from claq_exp.run.watcher import Watcher
from claq_exp.transform.smooth import Smooth

BATCHES = token_batches(3, size=2)
FINE = Recipe(Uniform(), Fixed(8), NoReservation(), Nearest())


def test_scales_are_those_of_equation_4():
    weights, inputs = torch.tensor([0.25, 4.0, 0.0, 1.0]), torch.tensor([16.0, 9.0, 3.0, 0.0])
    assert Smooth(0.5).scales(weights, inputs).tolist() == [8.0, 1.5, 1.0, 1.0]
    assert Smooth(1.0).scales(weights, inputs).tolist() == [16.0, 9.0, 1.0, 1.0]
    assert Smooth(0.0).scales(weights, inputs).tolist() == [4.0, 0.25, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"transform\.alpha is 2"):
        Smooth(2.0)


@torch.no_grad()
def test_half_and_half_leaves_inputs_and_columns_equally_large():
    model = WholeModel(ARCHITECTURES["llama"].build())
    inputs = capture_inputs(model, BATCHES)
    block = model.blocks[0]
    first, _ = Smooth().run(block, inputs[0])
    norm = first.norm(block)
    for name, factor in first.columns(block, norm).items():
        block.get_parameter(name).data.mul_(factor)
    for name, value in norm.items():
        block.get_parameter(name).data.copy_(value)
    seen = []
    hook = block.input_layernorm.register_forward_hook(lambda *args: seen.append(args[2]))
    for batch in range(len(BATCHES)):
        run_block(block, inputs[0], batch)
    hook.remove()
    entering = torch.cat([output.flatten(0, 1) for output in seen]).abs().amax(dim=0)
    matrices = [block.get_parameter(f"{name}.weight") for name in first.fold.consumers]
    columns = torch.stack([matrix.abs().amax(dim=0) for matrix in matrices]).amax(dim=0)
    assert entering.numpy() == pytest.approx(columns.numpy(), rel=1e-5)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "opt", "phi", "mixtral"])
def folder(request, tmp_path_factory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp(request.param), torch.float16)


def stored(place: Path) -> dict[str, torch.Tensor]:
    """What a store holds: dense tensors, and matrices as they are dequantized."""
    store = opened(place)
    packed = {f"{n}.{s}": t for n, w in store.packed().items() for s, t in w.tensors.items()}
    return packed | store.dense()


class KilledError(Exception):
    pass


def test_a_kill_between_fold_and_solve_costs_nothing(folder, tmp_path):
    def model(name):
        return open_model(folder, tmp_path / name, dtype="float32", device="cpu")

    quantize_model(model("a"), BATCHES, FINE, opened(tmp_path / "undisturbed"), transform=Smooth())
    expected = stored(tmp_path / "undisturbed")
    kills = []

    def kill(name, data):
        if name == "transform" and data["block"] not in kills:
            kills.append(data["block"])
            raise KilledError

    for number in range(4):
        store = opened(tmp_path / "killed")
        watcher = Watcher(event=kill)
        try:
            quantize_model(
                model(f"b{number}"), BATCHES, FINE, store, transform=Smooth(), watcher=watcher
            )
        except KilledError:
            continue
        break
    assert kills == list(range(len(kills)))
    assert len(kills) >= 2
    found = stored(tmp_path / "killed")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_the_model_in_memory_and_the_streamed_one_move_the_same(folder, tmp_path):
    streamed = open_model(folder, tmp_path / "work", dtype="float32", device="cpu")
    quantize_model(streamed, BATCHES, FINE, opened(tmp_path / "a"), transform=Smooth())
    opened_again = open_model(folder, tmp_path / "again", dtype="float32", device="cpu")
    whole = WholeModel(opened_again.load(), stored=torch.float16)
    quantize_model(whole, BATCHES, FINE, opened(tmp_path / "b"), transform=Smooth())
    first, second = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_run_has_the_moved_norms_in_its_checkpoint(tiny_run, tiny_model, tmp_path):
    words = ["experiment=rtn_4bit", "precision.bits=8", "transform=smooth"]
    assert main([*tiny_run, *words]) == 0
    (results,) = (tmp_path / "outputs").rglob("results.json")
    found = json.loads(results.read_text())
    scores = found["perplexity"]["wikipedia"]
    assert scores["quantized"] == pytest.approx(scores["original"], rel=1e-3)
    assert "smooth-" in results.parent.name
    checkpoint = results.parent / "checkpoint"
    kept = load_file(next(checkpoint.glob("*.safetensors")))
    before = load_file(tiny_model / "model.safetensors")
    name = "model.layers.1.post_attention_layernorm.weight"
    assert not torch.equal(kept[name], before[name])
    assert torch.equal(kept["model.norm.weight"], before["model.norm.weight"])
    loaded = load_model(checkpoint, dtype="float32", device="cpu")
    matrix = loaded.model.layers[1].mlp.up_proj.weight
    factor = before[name].float() / kept[name].float()
    expected = before["model.layers.1.mlp.up_proj.weight"].float() * factor
    assert (matrix - expected).norm() < 0.01 * expected.norm()
    events = (results.parent / "events.jsonl").read_text().splitlines()
    moved = [event for event in map(json.loads, events) if event["event"] == "transform"]
    assert [event["block"] for event in moved] == [0, 1, 2]


def test_rules_that_look_at_inputs_see_the_smoothed_model(tiny_run, tmp_path):
    words = ["experiment=w8a8/int_token", "activation.scope=static"]
    maxima = {}
    for transform in ("none", "smooth"):
        place = f"outputs={tmp_path / transform}"
        assert main([*tiny_run, *words, f"transform={transform}", place]) == 0
        (config,) = (tmp_path / transform).rglob("checkpoint/config.json")
        quantization = json.loads(config.read_text())["quantization_config"]
        maxima[transform] = quantization["activation"]["maxima"]
    for name, before in maxima["none"].items():
        same = name.endswith(("o_proj", "down_proj"))  # no norm feeds them
        assert (maxima["smooth"][name] == pytest.approx(before, rel=0.01)) == same, name


@pytest.mark.parametrize("family", ["transform", "tune", "allocation"])
def test_a_strategy_of_ones_own_that_lacks_something_is_one_line(family, tiny_run, capfd):
    assert main([*tiny_run, f"{family}.name=test_smooth:Lacking"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert f"{family}.name=test_smooth:Lacking has no " in line
    assert "let it inherit from claq_exp." in line


@dataclass(frozen=True)
class Lacking:
    """A rule of no family."""
