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
    store.keep_hidden("student", index, states, like)
    store.begin_block(index)


def fill(folder: Path, blocks: int) -> BlockStore:
    store = opened(folder)
    if store.hidden("student") is None:
        begin(store, 0)
    for index in range(store.blocks, blocks):
        for name, weight in packed(index).items():
            rows = [row for row in report(index) if row["name"] == name]
            store.add("quantize", index, packed={name: weight}, report=rows)
        begin(store, index + 1)
    return store


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_empty_store_has_no_blocks_and_makes_its_folder(tmp_path):
    store = opened(tmp_path / "deep" / "blocks")
    assert store.blocks == 0
    assert store.packed() == {}
    assert store.report("quantize") == []
    assert store.hidden("student") is None
    assert (tmp_path / "deep" / "blocks").is_dir()


@pytest.mark.parametrize("blocks", [1, 3])
def test_another_process_finds_the_blocks_the_rows_and_the_newest_activations(tmp_path, blocks):
    fill(tmp_path, blocks)
    store = opened(tmp_path)
    assert store.blocks == blocks
    assert store.report("quantize") == [row for index in range(blocks) for row in report(index)]
    expected = {name: weight for index in range(blocks) for name, weight in packed(index).items()}
    weights = store.packed()
    assert list(weights) == list(expected)
    assert list(store.packed(f"layers.{blocks - 1}.")) == list(packed(blocks - 1))
    for name, weight in expected.items():
        assert weights[name].layout == weight.layout
        assert set(weights[name].tensors) == set(weight.tensors)
        for suffix, tensor in weight.tensors.items():
            assert torch.equal(weights[name].tensors[suffix], tensor)
    loaded = store.hidden("student")
    assert len(loaded) == 12  # more than ten: names sort otherwise than numbers
    for mine, theirs in zip(loaded, activations(blocks), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == torch.float16


def test_only_the_newest_activations_are_kept(tmp_path):
    fill(tmp_path, 3)
    assert {name for name in names(tmp_path) if name.startswith("student")} == {
        "student_0003.safetensors"
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
    store.add("quantize", 1, packed=first, report=report(1)[:1])
    again = opened(tmp_path)
    assert again.blocks == 1
    assert list(again.packed("layers.1.")) == list(first)
    assert again.report("quantize") == [*report(0), report(1)[0]]


def test_files_without_a_state_are_no_blocks(tmp_path):
    (tmp_path / "quantize_0000_00.safetensors").write_bytes(b"half a file")
    (tmp_path / ".quantize_0000_00.safetensors").write_bytes(b"half")
    assert opened(tmp_path).blocks == 0
    fill(tmp_path, 1)
    store = opened(tmp_path)
    assert store.blocks == 1
    assert store.report("quantize") == report(0)


@pytest.mark.case(7)
def test_linears_that_cannot_be_recorded_are_not_counted(tmp_path):
    store = fill(tmp_path, 1)
    with pytest.raises(ValueError, match="JSON"):
        store.add("quantize", 1, packed=packed(1), report=[{"name": "q", "bits": float("nan")}])
    again = opened(tmp_path)
    assert again.blocks == 1
    assert again.report("quantize") == report(0)
    assert torch.equal(again.hidden("student")[0], activations(1)[0])


@pytest.mark.case(7)
def test_a_rename_that_fails_leaves_the_state_before_it(tmp_path, monkeypatch):
    store = fill(tmp_path, 1)

    def fail(self: Path, target: Path) -> None:
        raise OSError(5, "no luck", str(target))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no luck"):
        store.add("quantize", 1, packed=packed(1), report=report(1))
    with pytest.raises(OSError, match="no luck"):
        begin(store, 1)
    monkeypatch.undo()
    again = opened(tmp_path)
    assert again.blocks == 1
    assert again.report("quantize") == report(0)
    fill(tmp_path, 2)
    assert opened(tmp_path).blocks == 2


def test_activations_that_are_not_as_announced_are_refused(tmp_path):
    store = fill(tmp_path, 1)
    states = activations(2)
    like = {str(batch): tensor.float() for batch, tensor in enumerate(states)}
    with pytest.raises(CheckpointError, match="as announced"):
        store.keep_hidden("student", 2, states, like)
    like = {str(batch): tensor for batch, tensor in enumerate([*states, states[0]])}
    with pytest.raises(CheckpointError, match="12 was announced and not written"):
        store.keep_hidden("student", 2, states, like)
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
@pytest.mark.parametrize("key", ["blocks", "parts", "hidden", "snapshot", "identity", "version"])
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
@pytest.mark.parametrize("name", ["../quantize_0000_00.safetensors", "/etc/passwd", "..", 3])
@pytest.mark.parametrize("which", ["parts", "hidden", "snapshot"])
def test_a_state_that_names_a_file_elsewhere_is_refused(tmp_path, name, which):
    fill(tmp_path / "store", 2).save_snapshot("quantize", 2, {"step": torch.ones(1)})
    path = tmp_path / "store" / "state.json"
    state = json.loads(path.read_text())
    places = {"parts": state["parts"][0], "hidden": state["hidden"]["student"]}
    entry = places.get(which, state["snapshot"])
    entry["name"] = name
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        opened(tmp_path / "store")


@damaged_store
@pytest.mark.parametrize("file", ["quantize_0000_01", "quantize_0001_00", "student_0002"])
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
    assert store.hidden("student") is None
    kept = {"quantize_0000_01": 1, "quantize_0001_00": 2, "student_0002": 4}[file]
    assert store.report("quantize") == [row for index in range(2) for row in report(index)][:kept]


def number(value: float) -> dict[str, torch.Tensor]:
    return {"norm": torch.full((3,), value)}


def test_a_block_that_is_published_again_counts_as_it_was_published_last(tmp_path):
    store = fill(tmp_path, 2)
    new = {"layers.0.q": packed(5)["layers.5.q"]}
    row = {"block": 0, "name": "layers.0.q", "bits": 2.0}
    store.add("quantize", 0, packed=new, report=[row])
    again = opened(tmp_path)
    assert again.blocks == 2
    assert again.packed().keys() == {*packed(0), *packed(1)}
    for suffix, tensor in new["layers.0.q"].tensors.items():
        assert torch.equal(again.packed()["layers.0.q"].tensors[suffix], tensor)
    assert again.report("quantize") == [report(0)[1], *report(1), row]
    assert "quantize_0000_00.safetensors" not in names(tmp_path)  # nothing of it counts


def test_a_later_stage_counts_before_an_earlier_one_and_is_gone_without_it(tmp_path):
    store = fill(tmp_path, 1)
    store.add("tune", 0, dense=number(1.0), report=[{"name": "layers.0"}])
    store.add("finetune", None, packed=packed(0), dense=number(2.0))
    again = opened(tmp_path)
    assert again.dense()["norm"].tolist() == [2.0] * 3
    assert again.report("quantize") == report(0)
    assert again.report("tune") == [{"name": "layers.0"}]
    assert again.has("finetune", None)
    (path,) = tmp_path.glob("finetune_model*")
    path.write_bytes(b"damaged")
    told: list[str] = []
    again = BlockStore(tmp_path, {"run": "run", "torch": "2"})
    again.open(told.append)
    assert len(told) == 1
    assert not again.has("finetune", None)
    assert again.dense()["norm"].tolist() == [1.0] * 3
    assert (again.blocks, list(again.packed())) == (1, list(packed(0)))
    opened(tmp_path)  # what was dropped is not found again


def test_both_streams_are_kept_and_count_together(tmp_path):
    store = fill(tmp_path, 1)
    states = activations(7)
    like = {str(batch): tensor.to("meta") for batch, tensor in enumerate(states)}
    store.keep_hidden("teacher", 2, states, like)
    assert opened(tmp_path).hidden("teacher") is None
    store.add("quantize", 1, packed=packed(1), report=report(1))
    begin(store, 2)
    again = opened(tmp_path)
    assert torch.equal(again.hidden("teacher")[3], states[3])
    assert torch.equal(again.hidden("student")[3], activations(2)[3])


def test_a_snapshot_is_there_until_its_stage_has_published(tmp_path):
    store = fill(tmp_path, 1)
    store.save_snapshot("tune", 0, {"step": torch.tensor(1)})
    store.save_snapshot("tune", 0, {"step": torch.tensor(2)})
    again = opened(tmp_path)
    assert again.snapshot("tune", 0)["step"] == 2
    assert again.snapshot("tune", 1) is None
    again.add("tune", 0, dense=number(1.0))
    assert again.snapshot("tune", 0) is None
    assert not list(tmp_path.glob("snapshot*"))


def test_a_damaged_snapshot_costs_nothing_else(tmp_path):
    fill(tmp_path, 1).save_snapshot("tune", 0, {"step": torch.tensor(1)})
    (path,) = tmp_path.glob("snapshot*")
    path.write_bytes(b"")
    told: list[str] = []
    store = BlockStore(tmp_path, {"run": "run", "torch": "2"})
    store.open(told.append)
    assert len(told) == 1
    assert store.snapshot("tune", 0) is None
    assert (store.blocks, store.report("quantize")) == (1, report(0))


@pytest.mark.case(9)
@pytest.mark.parametrize("version", [1, 2])
def test_the_store_of_an_earlier_release_is_started_over_with_one_line(tmp_path, version):
    fill(tmp_path, 1)
    path = tmp_path / "state.json"
    identity = json.loads(path.read_text())["identity"]
    old = {"version": version, "identity": identity, "blocks": 1, "parts": [], "activations": None}
    path.write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match=f"version {version}, this release reads 3"):
        opened(tmp_path)
    told: list[str] = []
    store = BlockStore(tmp_path, {"run": "run", "torch": "2"})
    store.open(told.append)
    assert told == [f"{path} is of an earlier release (store {version})"]
    assert names(tmp_path) == set()
    assert opened(tmp_path).blocks == 0
    fill(tmp_path, 1)
    assert opened(tmp_path).report("quantize") == report(0)


@pytest.mark.case(9, 10)
def test_the_store_of_another_run_is_not_started_over_because_it_is_old(tmp_path):
    fill(tmp_path, 1)
    path = tmp_path / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    store = BlockStore(tmp_path, {"run": "other", "torch": "2"})
    with pytest.raises(CheckpointError, match="run run, this run other"):
        store.open(lambda _: None)
    assert len(names(tmp_path)) == 4
