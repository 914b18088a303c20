"""A changed tensor of a model reaches the checkpoint, or the change is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES
from torch import nn
from transformers import AutoTokenizer

from claq_exp.checkpoint.writer import write_checkpoint
from claq_exp.errors import NumericalError
from claq_exp.models.load import open_model
from claq_exp.models.overlay import Overlay
from claq_exp.models.stream import StreamedModel, WholeModel

NORM = "model.layers.0.input_layernorm.weight"
MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    ARCHITECTURES["llama"].build().bfloat16().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def model(folder, tmp_path) -> StreamedModel:
    return open_model(folder, tmp_path / "work", dtype="float32", device="cpu")


def in_place(block: nn.Module, name: str) -> None:
    with torch.no_grad():
        block.get_parameter(name).mul_(2)


def behind_its_back(block: nn.Module, name: str) -> None:
    block.get_parameter(name).data[..., 0] += 1


def in_its_place(block: nn.Module, name: str) -> None:
    path, _, own = name.rpartition(".")
    module = block.get_submodule(path)
    setattr(module, own, nn.Parameter(getattr(module, own) * 2))


def by_shape(block: nn.Module, name: str) -> None:
    path, _, own = name.rpartition(".")
    setattr(block.get_submodule(path), own, nn.Parameter(torch.ones(3)))


def away(block: nn.Module, name: str) -> None:
    path, _, own = name.rpartition(".")
    setattr(block.get_submodule(path), own, None)


WAYS = [in_place, behind_its_back, in_its_place, by_shape, away]


@pytest.mark.case(149)
@pytest.mark.parametrize("name", [NORM, MATRIX])
@pytest.mark.parametrize("way", WAYS)
def test_a_change_inside_a_block_that_would_be_lost_is_refused(model, way, name):
    with (
        pytest.raises(ValueError, match=f"{name} was changed .* would be lost"),
        model.block(0) as block,
    ):
        way(block, name.removeprefix("model.layers.0."))
    assert block.get_parameter(name.removeprefix("model.layers.0.")).is_meta
    with model.block(0):
        pass


@pytest.mark.case(149)
def test_a_change_outside_of_the_blocks_is_refused_too(model):
    with pytest.raises(ValueError, match=r"model\.norm\.weight"), model.outside(head=True) as whole:
        in_place(whole, "model.norm.weight")


def test_what_a_caller_keeps_elsewhere_it_may_change(model):
    with model.block(0, packed={MATRIX}) as block:
        in_place(block, MATRIX.removeprefix("model.layers.0."))
    with pytest.raises(ValueError, match="up_proj"), model.block(0, packed={NORM}) as block:
        in_place(block, MATRIX.removeprefix("model.layers.0."))


def test_an_error_inside_a_block_is_the_one_that_is_seen(model):
    with pytest.raises(KeyError, match="mine"), model.block(0) as block:
        in_place(block, NORM.removeprefix("model.layers.0."))
        raise KeyError("mine")


@pytest.mark.case(149)
def test_a_changed_norm_is_in_the_block_the_export_and_the_loaded_model(
    model, folder, tmp_path, tiny_model
):
    original = model.read(NORM).clone()
    with model.block(0) as block:
        norm = block.input_layernorm.weight
        with torch.no_grad():
            norm.copy_(model.overlay.change(NORM, norm * 1.7))
        changed = norm.clone()
    assert torch.equal(changed, changed.bfloat16().float())  # as the checkpoint will hold it
    assert not torch.equal(changed, original.float())
    with model.block(0) as block:
        assert torch.equal(block.input_layernorm.weight, changed)
    with model.block(0, original=True) as block:
        assert torch.equal(block.input_layernorm.weight, original.float())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_checkpoint(tmp_path / "out", model.model, tokenizer, {}, torch.bfloat16, read=model.read)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(folder / "model.safetensors")
    assert torch.equal(stored[NORM].float(), changed)
    for name in source.keys() - {NORM}:
        assert torch.equal(stored[name], source[name]), name
    assert torch.equal(model.load().model.layers[0].input_layernorm.weight, changed)


def test_a_tied_tensor_is_changed_under_either_of_its_names():
    source = {"embedding": torch.zeros(2)}
    overlay = Overlay(source.__getitem__, tied={"head": "embedding"})
    overlay.change("head", torch.ones(2))
    assert torch.equal(overlay.read("embedding"), torch.ones(2))
    assert torch.equal(overlay.read("head"), torch.ones(2))
    assert torch.equal(overlay.original("head"), torch.zeros(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_value_that_the_checkpoint_cannot_hold_is_refused_by_name(value):
    overlay = Overlay(lambda _: torch.zeros(1), torch.float16)
    with pytest.raises(NumericalError, match=f"{NORM} was changed to a value that torch.float16"):
        overlay.change(NORM, torch.tensor([value]))
    assert torch.equal(overlay.read(NORM), torch.zeros(1))


def test_a_change_that_no_tensor_takes_is_refused(model):
    with pytest.raises(KeyError, match="norm"):
        model.overlay.change("model.layers.0.norm", torch.ones(24))
    with pytest.raises(ValueError, match=r"\[24\], and cannot be changed to \[23\]"):
        model.overlay.change(NORM, torch.ones(23))


def test_a_model_in_memory_takes_over_what_was_changed_and_has_no_original_then():
    model = WholeModel(ARCHITECTURES["llama"].build())
    original = model.read(NORM).clone()
    model.overlay.update({NORM: original + 1})
    with model.block(0, original=True) as block:
        assert torch.equal(block.input_layernorm.weight, original)
    with model.block(0) as block:
        assert torch.equal(block.input_layernorm.weight, original + 1)
    with pytest.raises(ValueError, match="original of block 0"):
        model.block(0, original=True)
    with model.block(1, original=True):
        pass
