"""Models of several towers: the text tower is quantized, the others are kept as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from quantized_models import opened
from tiny_architectures import token_batches
from tiny_towers import TOWERS, Towers
from torch import nn
from transformers import AutoModelForMultimodalLM, AutoTokenizer, PreTrainedModel

import claq_exp
from claq_exp.checkpoint.reader import open_checkpoint, read_layouts, read_unquantized
from claq_exp.checkpoint.writer import checkpoint_sizes, planned_sizes, write_checkpoint
from claq_exp.evaluation.predict import streamed
from claq_exp.export.dense import write_dense
from claq_exp.models.discover import find_blocks, linears_of
from claq_exp.models.load import load_config, open_model
from claq_exp.models.skeleton import dense_parameter_count, skeleton
from claq_exp.models.stream import WholeModel
from claq_exp.models.towers import other_towers, text_tower
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import OutlierOrder
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import Fixed
from claq_exp.quantize.solver import Gptq
from claq_exp.run.quantize import quantize_model
from claq_exp.runtime.linear import quantized_linears

RECIPE = Recipe(KMeans(), OutlierOrder(2.5), Fixed(0.02), Gptq())
BATCHES = [batch % 50 + 1 for batch in token_batches(2, size=4)]
TOKENS = BATCHES[0]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 sums in another order

pytestmark = pytest.mark.case(116)


@dataclass(frozen=True)
class Written:
    """A model's folder, its checkpoint, and the quantized model in memory."""

    towers: Towers
    source: Path
    folder: Path
    model: PreTrainedModel


def text_logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


def image_logits(model: nn.Module, towers: Towers) -> torch.Tensor:
    with torch.inference_mode():
        return model(**towers.seen(), use_cache=False).logits


@pytest.fixture(scope="module", params=TOWERS)
def written(request, tmp_path_factory, tiny_model) -> Written:
    """Quantized block by block from its folder, and for comparison in memory."""
    place = tmp_path_factory.mktemp(request.param)
    towers = TOWERS[request.param]
    model = towers.build(request.param)
    model.save_pretrained(place / "source")
    original = text_logits(model)
    parts = open_model(place / "source", place / "work", dtype="float32", device="cpu")
    torch.testing.assert_close(text_logits(parts.load()), original, **CLOSE)
    parts = open_model(place / "source", place / "work", dtype="float32", device="cpu")
    store = opened(place / "blocks")
    quantize_model(parts, BATCHES, RECIPE, store)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    packed = store.packed()
    write_checkpoint(
        place / "checkpoint", parts.model, tokenizer, packed, torch.float32, read=parts.read
    )
    quantize_model(WholeModel(model), BATCHES, RECIPE, opened(place / "whole"))
    assert (text_logits(model) - original).abs().max() > 0.1
    return Written(towers, place / "source", place / "checkpoint", model)


@pytest.mark.parametrize("kind", TOWERS)
def test_the_blocks_are_those_of_the_text_tower(kind):
    model = TOWERS[kind].build(kind)
    path, _ = find_blocks(model)
    assert path == TOWERS[kind].blocks
    name, tower = text_tower(model)
    assert path.startswith(f"{name}.")
    (other,) = other_towers(model)
    assert not set(other.modules()) & set(tower.modules())
    _, largest = find_blocks(other)
    assert count(largest) > count(find_blocks(model)[1])


def count(blocks: nn.ModuleList) -> int:
    return sum(layer.weight.numel() for block in blocks for layer in linears_of(block).values())


def test_the_linears_of_its_blocks_are_packed_and_the_rest_is_kept(written):
    layouts = read_layouts(written.folder)
    blocks = written.model.get_submodule(written.towers.blocks)
    expected = {
        f"{written.towers.blocks}.{index}.{name}"
        for index, block in enumerate(blocks)
        for name in linears_of(block)
    }
    assert set(layouts) == expected
    kept = dict(read_unquantized(written.folder))
    state = written.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept.items())
    for tower in other_towers(written.model):
        name = next(n for n, module in written.model.named_modules() if module is tower)
        assert {f"{name}.{own}" for own in tower.state_dict()} <= set(kept)


@pytest.mark.parametrize("kernel", ["dense", "reference", "auto"])
def test_the_checkpoint_gives_the_logits_of_the_quantized_model(written, kernel):
    loaded = claq_exp.load(written.folder, kernel=kernel)
    torch.testing.assert_close(text_logits(loaded), text_logits(written.model), **CLOSE)
    if written.towers.image:
        expected = image_logits(written.model, written.towers)
        torch.testing.assert_close(image_logits(loaded, written.towers), expected, **CLOSE)


def test_transformers_loads_it_by_the_auto_class_of_the_original(written, tmp_path):
    loaded, report = AutoModelForMultimodalLM.from_pretrained(
        written.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert type(loaded) is type(written.model)
    assert set(quantized_linears(loaded)) == set(read_layouts(written.folder))
    torch.testing.assert_close(text_logits(loaded), text_logits(written.model), **CLOSE)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(text_logits(again), text_logits(loaded))


def test_dequantized_it_is_a_plain_model_of_transformers(written, tmp_path):
    write_dense(written.folder, tmp_path / "dense", dtype="float32")
    plain, report = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    torch.testing.assert_close(text_logits(plain), text_logits(written.model), **CLOSE)
    if written.towers.image:
        expected = image_logits(written.model, written.towers)
        torch.testing.assert_close(image_logits(plain, written.towers), expected, **CLOSE)


def test_measured_block_by_block_it_has_the_same_logits(written):
    parts = open_checkpoint(written.folder)
    (logits,) = streamed(parts)([TOKENS], lambda _: None)
    assert torch.equal(logits, text_logits(claq_exp.load(written.folder, kernel="dense")))


def test_text_alone_reads_no_other_tower(written):
    parts = open_checkpoint(written.folder)
    (tower,) = other_towers(parts.model)
    with parts.outside(head=True):
        held = sum(p.numel() for p in tower.parameters() if not p.is_meta)
    assert held < 0.25 * sum(p.numel() for p in tower.parameters())


def test_all_towers_count_in_the_bits_of_the_model(written):
    layouts = read_layouts(written.folder)
    parameters = dense_parameter_count(load_config(written.folder))
    assert parameters == sum(p.numel() for p in written.model.parameters())
    found = checkpoint_sizes(written.folder, layouts, parameters)
    weights = sum(layout.weights for layout in layouts.values())
    assert found.ledger.unquantized == 32 * (parameters - weights)
    planned = planned_sizes(skeleton(load_config(written.source)), layouts, torch.float32)
    assert planned.ledger.unquantized == found.ledger.unquantized
    assert planned.model == pytest.approx(found.model, rel=0.02)
