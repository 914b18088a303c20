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
        system = RECIPE.solver.prepare(hessian)
        quantized = quantize_weight(LinearProblem(weight, hessian), system, RECIPE).quantized
        weights[f"layers.{index}.{name}"] = PackedWeight(quantized.layout(), quantized.pack())
    return weights


def report(index: int) -> list[dict[str, object]]:
    return [{"block": index, "name": f"layers.{index}.{name}", "bits": 3.25} for name in "qk"]


def activations(index: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    return [torch.randn(2, 4, 5, generator=generator).half() for _ in range(12)]


def fill(folder: Path, blocks: int) -> BlockStore:
    store = BlockStore(folder, "run")
    store.open()
    for index in range(blocks):
        store.save_block(packed(index), report(index), activations(index))
    return store


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_empty_store_has_no_blocks_and_makes_its_folder(tmp_path):
    store = BlockStore(tmp_path / "deep" / "blocks", "run")
    assert store.open() == 0
    assert store.load_blocks() == ({}, [])
    assert (tmp_path / "deep" / "blocks").is_dir()


@pytest.mark.parametrize("blocks", [1, 3])
def test_another_process_finds_the_blocks_the_rows_and_the_newest_activations(tmp_path, blocks):
    fill(tmp_path, blocks)
    store = BlockStore(tmp_path, "run")
    assert store.open() == blocks
    weights, rows = store.load_blocks()
    assert rows == [row for index in range(blocks) for row in report(index)]
    expected = {name: weight for index in range(blocks) for name, weight in packed(index).items()}
    assert list(weights) == list(expected)
    for name, weight in expected.items():
        assert weights[name].layout == weight.layout
        assert set(weights[name].tensors) == set(weight.tensors)
        for suffix, tensor in weight.tensors.items():
            assert torch.equal(weights[name].tensors[suffix], tensor)
    loaded = store.load_activations()
    assert len(loaded) == 12  # more than ten: names sort otherwise than numbers
    for mine, theirs in zip(loaded, activations(blocks - 1), strict=True):
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
    store = BlockStore(tmp_path / "parts", "run")
    assert store.open() == 1
    for index in (1, 2):
        store.save_block(packed(index), report(index), activations(index))
    assert names(tmp_path / "parts") == names(tmp_path / "whole")
    for name in names(tmp_path / "whole"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_files_without_a_state_are_no_blocks(tmp_path):
    (tmp_path / "block_0000.safetensors").write_bytes(b"half a file")
    (tmp_path / ".block_0000.safetensors").write_bytes(b"half")
    assert BlockStore(tmp_path, "run").open() == 0
    fill(tmp_path, 1)
    store = BlockStore(tmp_path, "run")
    assert store.open() == 1
    assert store.load_blocks()[1] == report(0)


@pytest.mark.case(7)
def test_a_block_that_cannot_be_recorded_is_not_counted(tmp_path):
    store = fill(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON"):
        store.save_block(packed(1), [{"output_error": float("nan")}], activations(1))
    again = BlockStore(tmp_path, "run")
    assert again.open() == 1
    assert again.load_blocks()[1] == report(0)
    assert torch.equal(again.load_activations()[0], activations(0)[0])


def test_clear_removes_everything(tmp_path):
    store = fill(tmp_path / "blocks", 2)
    store.clear()
    assert not (tmp_path / "blocks").exists()
    assert BlockStore(tmp_path / "blocks", "run").open() == 0


@pytest.mark.case(10)
def test_the_store_of_another_experiment_is_refused(tmp_path):
    fill(tmp_path, 1)
    with pytest.raises(CheckpointError, match="identity") as caught:
        BlockStore(tmp_path, "other").open()
    assert "resume=never" in str(caught.value)


@pytest.mark.case(9)
def test_the_store_of_another_version_is_refused(tmp_path):
    fill(tmp_path, 1)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "version": 2}))
    with pytest.raises(CheckpointError, match="version 2"):
        BlockStore(tmp_path, "run").open()


def read_all(folder: Path) -> None:
    store = BlockStore(folder, "run")
    store.open()
    store.load_blocks()
    store.load_activations()


@pytest.mark.case(9)
@pytest.mark.parametrize("keep", [0, 1, 40, -3])
def test_a_cut_state_is_refused(tmp_path, keep):
    fill(tmp_path, 2)
    path = tmp_path / "state.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_all(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}"])
def test_a_state_of_another_form_is_refused(tmp_path, text):
    fill(tmp_path, 2)
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_all(tmp_path)


@pytest.mark.parametrize("key", ["blocks", "activations", "identity", "version"])
def test_a_state_without_one_of_its_facts_is_refused(tmp_path, key):
    fill(tmp_path, 2)
    path = tmp_path / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in state.items() if name != key}))
    with pytest.raises(CheckpointError):
        read_all(tmp_path)


@pytest.mark.case(8)
@pytest.mark.parametrize("file", ["block_0000", "block_0001", "activations_0002"])
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_a_damaged_file_is_refused_by_name(tmp_path, file, damage):
    fill(tmp_path, 2)
    path = tmp_path / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flipped bit":
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=file) as caught:
        read_all(tmp_path)
    assert "resume=never" in str(caught.value)
