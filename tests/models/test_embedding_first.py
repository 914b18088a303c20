"""An embedding of its own is quantized before the blocks, which are quantized on what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from quantized_models import opened
from tiny_architectures import ARCHITECTURES, streamed, token_batches
from torch import Tensor
from transformers import PreTrainedModel

from claq_exp.calibration.streams import TEACHER
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.models.blocks import entering_hidden
from claq_exp.models.ends import find_ends
from claq_exp.models.stream import BlockedModel, WholeModel
from claq_exp.payload import unpack_weight
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.ends import EndRule, KMeansEnd, NoEnd, SameEnd
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.run.ends import chosen_ends
from claq_exp.run.quantize import quantize_model
from claq_exp.run.watcher import Watcher
from claq_exp.system.interruption import Interrupted
from claq_exp.train.window import Cost, Tune, Tuned, Window

RECIPE = Recipe(KMeans(), Fixed(4), NoReservation(), Gptq())
BATCHES = token_batches(2, size=4)
RULE = KMeansEnd(bits=2)  # an error that blocks notice
BOTH = (RULE, SameEnd())


def built(name: str) -> PreTrainedModel:
    own = ARCHITECTURES[name]
    return replace(own, options={**own.options, "tie_word_embeddings": False}).build()


def quantized(
    model: BlockedModel, folder: Path, rules: tuple[EndRule, EndRule] = BOTH, **options
) -> dict[str, PackedWeight]:
    store = opened(folder)
    ends = chosen_ends(model.model, *rules)
    quantize_model(model, BATCHES, RECIPE, store, ends=ends, **options)
    return store.packed()


def dense(packed: PackedWeight) -> Tensor:
    return unpack_weight(packed.layout, packed.tensors).dequantize()


def assert_same(one: dict[str, PackedWeight], two: dict[str, PackedWeight]) -> None:
    assert one.keys() == two.keys()
    for name, weight in one.items():
        for suffix, tensor in weight.tensors.items():
            assert torch.equal(tensor, two[name].tensors[suffix]), f"{name}.{suffix}"


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt_350m"])  # plain, scaled, projected
def test_blocks_and_head_are_those_of_a_model_that_has_the_packed_embedding(name, tmp_path):
    model = built(name)
    end = find_ends(model).embedding
    original = model.get_submodule(end).weight.clone()
    found = quantized(WholeModel(model), tmp_path / "first")
    assert torch.equal(model.get_submodule(end).weight, original)  # it is lent other rows only
    embedding = found.pop(end)
    other = built(name)
    other.get_submodule(end).weight.data.copy_(dense(embedding))
    assert_same(found, quantized(WholeModel(other), tmp_path / "other", (NoEnd(), RULE)))


def test_a_streamed_model_gives_the_same_as_a_whole_one(tmp_path):
    built("llama").save_pretrained(tmp_path / "model")
    model = streamed(tmp_path / "model", tmp_path / "work")
    assert_same(
        quantized(model, tmp_path / "streamed"),
        quantized(WholeModel(built("llama")), tmp_path / "whole"),
    )


@dataclass(frozen=True)
class Following(Tune):
    """Notes what enters the student's first block, and what leaves the teacher's."""

    wants: ClassVar[frozenset[str]] = frozenset({TEACHER})
    student: list[Tensor] = field(default_factory=list)
    teacher: list[Tensor] = field(default_factory=list)

    def cost(self, batches: int) -> Cost:
        return Cost()

    def run(self, window: Window) -> Tuned:
        if not self.student:
            self.student.extend(hidden.clone() for hidden in window.inputs.hidden)
            self.teacher.extend(hidden.clone() for hidden in window.teacher)
        return Tuned()


@torch.no_grad()
def test_the_teacher_keeps_the_original_embedding(tmp_path):
    tune, model = Following(), built("llama")
    ids = [batch.reshape(-1) for batch in BATCHES]
    expected = [model(batch, output_hidden_states=True).hidden_states[1] for batch in BATCHES]
    found = quantized(WholeModel(model), tmp_path, tune=tune)
    table = dense(found["model.embed_tokens"])
    torch.testing.assert_close(tune.teacher, expected)
    for hidden, own in zip(tune.student, ids, strict=True):
        assert torch.equal(hidden.reshape(len(own), -1), table[own])


def test_rows_of_another_table_are_lent_and_given_back():
    model = WholeModel(built("gemma3"))
    table = model.model.get_input_embeddings()
    before, plain = table.weight, list(entering_hidden(model, BATCHES))
    doubled = list(entering_hidden(model, BATCHES, lambda ids: 2 * before[ids]))
    for one, two in zip(plain, doubled, strict=True):
        assert torch.equal(two, 2 * one)
    assert table.weight is before
    for one, two in zip(plain, entering_hidden(model, BATCHES), strict=True):
        assert torch.equal(one, two)


def test_a_run_that_stops_behind_the_embedding_goes_on_to_the_same_tensors(tmp_path):
    expected = quantized(WholeModel(built("llama")), tmp_path / "whole")
    with pytest.raises(Interrupted):
        quantized(
            WholeModel(built("llama")), tmp_path / "parts", watcher=Watcher(stopping=lambda: True)
        )
    store = opened(tmp_path / "parts")
    assert list(store.packed()) == ["model.embed_tokens"]
    rows = []
    again = quantized(
        WholeModel(built("llama")),
        tmp_path / "parts",
        watcher=Watcher(event=lambda name, row: rows.append(row) if name == "layer" else None),
    )
    assert_same(again, expected)
    assert "model.embed_tokens" not in [row["name"] for row in rows]
    told = [row["name"] for row in opened(tmp_path / "parts").report("embedding")]
    assert told == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("name", ["llama", "llama_tied_biased"])
def test_shares_of_blocks_and_ends_add_up_and_name_the_ends(name, tmp_path):
    shares: list[tuple[float, str]] = []
    model = ARCHITECTURES[name].build()
    watcher = Watcher(share=lambda share, where: shares.append((share, where)))
    quantized(WholeModel(model), tmp_path, watcher=watcher)
    assert sum(share for share, _ in shares) == pytest.approx(1)
    ends = find_ends(model)
    named = [where for _, where in shares]
    assert named[-1] == (ends.embedding if ends.tied else ends.head)
    assert (named[0] == ends.embedding) == (not ends.tied)
    assert {share for share, where in shares if where == named[-1]} > {0.0}
