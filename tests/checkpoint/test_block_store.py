"""The store of finished blocks: what it was given comes back, or is refused; nothing in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.errors import CheckpointError
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.solver import Nearest

RECIPE = Recipe(KMeans(), Fixed(3), FixedReservation(0.1), Nearest())


def packed(index: int) -> dict[str, PackedWeight]:
    weights = {}
    for name in ("q", "k"):
        weight = torch.randn(9, 5, generator=torch.Generator().manual_seed(index))
        hessian = torch.eye(5, dtype=torch.float64)
        system = RECIPE.solver.prepare(Moments(hessian))
        quantized = quantize_weight(LinearProblem(weight, hessian), system, RECIPE).quantized
        weights[f"layers.{index}.{name}"] = PackedWeight(quantized.layout(), quantized.pack())
    return weights


def report(index: int) -> list[dict[str, object]]:
    return [{"block": index, "name": f"layers.{index}.{name}", "bits": 3.25} for name in "qk"]


def activations(index: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    return [torch.randn(2, 4, 5, generator=generator).half() for _ in range(12)]


def opened(folder: Path, run: str = "run") -> BlockStore:
    store = BlockStore(folder, {"run": run, "torch": "2"})
    store.open()
    return store


def begin(store: BlockStore, index: int) -> None:
    states = activations(index)
    like = {str(batch): tensor.to("meta") for batch, tensor in enumerate(states)}
    store.begin_block(index, states, like)


def fill(folder: Path, blocks: int) -> BlockStore:
    store = opened(folder)
    if store.activations() is None:
        begin(store, 0)
    for index in range(store.blocks, blocks):
        for name, weight in packed(index).items():
            rows = [row for row in report(index) if row["name"] == name]
            store.add(index, {name: weight}, rows)
        begin(store, index + 1)
    return store


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_empty_store_has_no_blocks_and_makes_its_folder(tmp_path):
    store = opened(tmp_path / "deep" / "blocks")
    assert store.blocks == 0
    assert store.packed() == {}
    assert store.report() == []
    assert store.activations() is None
    assert (tmp_path / "deep" / "blocks").is_dir()


@pytest.mark.parametrize("blocks", [1, 3])
def test_another_process_finds_the_blocks_the_rows_and_the_newest_activations(tmp_path, blocks):
    fill(tmp_path, blocks)
    store = opened(tmp_path)
    assert store.blocks == blocks
    assert store.report() == [row for index in range(blocks) for row in report(index)]
    expected = {name: weight for index in range(blocks) for name, weight in packed(index).items()}
    weights = store.packed()
    assert list(weights) == list(expected)
    assert list(store.packed(blocks - 1)) == list(packed(blocks - 1))
    for name, weight in expected.items():
        assert weights[name].layout == weight.layout
        assert set(weights[name].tensors) == set(weight.tensors)
        for suffix, tensor in weight.tensors.items():
            assert torch.equal(weights[name].tensors[suffix], tensor)
    loaded = store.activations()
    assert len(loaded) == 12  # more than ten: names sort otherwise than numbers
    for mine, theirs in zip(loaded, activations(blocks), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == torch.float16


def test_only_the_newest_activations_are_kept(tmp_path):
    fill(tmp_path, 3)
    assert {name for name in names(tmp_path) if name.startswith("activations")} == {
        "activations_0003.safetensors"
    }


def test_a_store_that_was_reopened_goes_on_where_it_ended(tmp_path):
    fill(tmp_path / "whole", 3)
    fill(tmp_path / "parts", 1)
    fill(tmp_path / "parts", 3)
    assert names(tmp_path / "parts") == names(tmp_path / "whole")
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_linears_of_a_block_that_is_not_finished_are_found(tmp_path):
    store = fill(tmp_path, 1)
    first = dict([next(iter(packed(1).items()))])
    store.add(1, first, report(1)[:1])
    again = opened(tmp_path)
    assert again.blocks == 1
    assert list(again.packed(1)) == list(first)
    assert again.report() == [*report(0), report(1)[0]]


def test_files_without_a_state_are_no_blocks(tmp_path):
    (tmp_path / "block_0000_00.safetensors").write_bytes(b"half a file")
    (tmp_path / ".block_0000_00.safetensors").write_bytes(b"half")
    assert opened(tmp_path).blocks == 0
    fill(tmp_path, 1)
    store = opened(tmp_path)
    assert store.blocks == 1
    assert store.report() == report(0)


@pytest.mark.case(7)
def test_linears_that_cannot_be_recorded_are_not_counted(tmp_path):
    store = fill(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON"):
        store.add(1, packed(1), [{"output_error": float("nan")}])
    again = opened(tmp_path)
    assert again.blocks == 1
    assert again.report() == report(0)
    assert torch.equal(again.activations()[0], activations(1)[0])


@pytest.mark.case(7)
def test_a_rename_that_fails_leaves_the_state_before_it(tmp_path, monkeypatch):
    store = fill(tmp_path, 1)

    def fail(self: Path, target: Path) -> None:
        raise OSError(5, "no luck", str(target))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no luck"):
        store.add(1, packed(1), report(1))
    with pytest.raises(OSError, match="no luck"):
        begin(store, 1)
    monkeypatch.undo()
    again = opened(tmp_path)
    assert again.blocks == 1
    assert again.report() == report(0)
    fill(tmp_path, 2)
    assert opened(tmp_path).blocks == 2


def test_activations_that_are_not_as_announced_are_refused(tmp_path):
    store = fill(tmp_path, 1)
    states = activations(2)
    like = {str(batch): tensor.float() for batch, tensor in enumerate(states)}
    with pytest.raises(CheckpointError, match="as announced"):
        store.begin_block(2, states, like)
    like = {str(batch): tensor for batch, tensor in enumerate([*states, states[0]])}
    with pytest.raises(CheckpointError, match="12 was announced and not written"):
        store.begin_block(2, states, like)
    assert opened(tmp_path).blocks == 1


def test_clear_removes_everything(tmp_path):
    store = fill(tmp_path / "blocks", 2)
    store.clear()
    assert not (tmp_path / "blocks").exists()
    assert opened(tmp_path / "blocks").blocks == 0


@pytest.mark.case(10)
def test_the_store_of_another_experiment_is_refused(tmp_path):
    fill(tmp_path, 1)
    with pytest.raises(CheckpointError, match="run run, this run other") as caught:
        opened(tmp_path, "other")
    assert "resume=never" in str(caught.value)


@pytest.mark.case(9)
def test_the_store_of_another_version_is_refused(tmp_path):
    fill(tmp_path, 1)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "version": 9}))
    with pytest.raises(CheckpointError, match="version 9"):
        opened(tmp_path)


damaged_store = pytest.mark.case(8, 9)


@damaged_store
@pytest.mark.parametrize("keep", [0, 1, 40, -3])
def test_a_cut_state_is_refused(tmp_path, keep):
    fill(tmp_path, 2)
    path = tmp_path / "state.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"state\.json"):
        opened(tmp_path)


@damaged_store
@pytest.mark.parametrize("text", ["[]", "null", "3", "{}"])
def test_a_state_of_another_form_is_refused(tmp_path, text):
    fill(tmp_path, 2)
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        opened(tmp_path)


@damaged_store
@pytest.mark.parametrize("key", ["blocks", "parts", "activations", "identity", "version"])
def test_a_state_without_one_of_its_facts_is_refused(tmp_path, key):
    fill(tmp_path, 2)
    path = tmp_path / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in state.items() if name != key}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        opened(tmp_path)


@damaged_store
@pytest.mark.parametrize("blocks", [-1, 3, "many"])
def test_a_count_of_blocks_that_the_files_do_not_bear_is_refused(tmp_path, blocks):
    fill(tmp_path, 2)
    path = tmp_path / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "blocks": blocks}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        opened(tmp_path)


@damaged_store
@pytest.mark.parametrize("name", ["../block_0000_00.safetensors", "/etc/passwd", "..", 3])
@pytest.mark.parametrize("which", ["parts", "activations"])
def test_a_state_that_names_a_file_elsewhere_is_refused(tmp_path, name, which):
    fill(tmp_path / "store", 2)
    path = tmp_path / "store" / "state.json"
    state = json.loads(path.read_text())
    entry = state["parts"][0] if which == "parts" else state["activations"]
    entry["name"] = name
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        opened(tmp_path / "store")


@damaged_store
@pytest.mark.parametrize("file", ["block_0000_01", "block_0001_00", "activations_0002"])
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing", "empty"])
def test_a_damaged_file_is_refused_by_name_or_not_used(tmp_path, file, damage):
    fill(tmp_path, 2)
    path = tmp_path / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped bit":
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage != "missing":
        path.write_bytes(content[:-1] if damage == "truncated" else b"")
    with pytest.raises(CheckpointError, match=file) as caught:
        opened(tmp_path)
    assert "resume=never" in str(caught.value)
    told: list[str] = []
    store = BlockStore(tmp_path, {"run": "run", "torch": "2"})
    store.open(told.append)
    assert [str(path) in message for message in told] == [True]
    assert store.activations() is None
    kept = {"block_0000_01": 1, "block_0001_00": 2, "activations_0002": 4}[file]
    assert store.report() == [row for index in range(2) for row in report(index)][:kept]
