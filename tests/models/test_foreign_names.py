"""Tensors of every kind of model find the part that they belong to, by their names in its files."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES
from tiny_towers import TOWERS

from claq_exp.foreign.found import find_foreign
from claq_exp.foreign.ledger import ForeignLedger, read_ledger
from claq_exp.models.experts import fuse_experts

BUILDS = {
    **{name: architecture.build for name, architecture in ARCHITECTURES.items()},
    **{f"towers of {name}": lambda name=name: TOWERS[name].build(name) for name in TOWERS},
}


def saved(name: str, folder) -> ForeignLedger:
    model = BUILDS[name]()
    if name in ARCHITECTURES:
        fuse_experts(model)
    model.save_pretrained(folder)
    return read_ledger(find_foreign(folder))


@pytest.mark.parametrize("name", BUILDS)
def test_every_tensor_has_an_owner_and_every_linear_layer_its_tensors(name, tmp_path):
    ledger = saved(name, tmp_path)
    assert not ledger.notes()
    assert ledger.linear == 32
    assert sum(ledger.accounts.values()) == 8 * ledger.bytes
    if name in ARCHITECTURES:
        found = {linear.name for linear in ledger.linears}
        routers = {layer for layer in ARCHITECTURES[name].linears() if layer.endswith("mlp.gate")}
        assert found == set(ARCHITECTURES[name].linears()) - routers


def test_packed_tensors_of_experts_by_older_names_find_their_layers(tmp_path):
    saved("mixtral", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    expert = re.compile(r"(.*experts\.\d+\.w[123])\.weight")
    packed = {expert.sub(r"\1.qweight", name): tensor.char() for name, tensor in state.items()}
    assert any("block_sparse_moe" in name and "qweight" in name for name in packed)
    save_file(packed, tmp_path / "model.safetensors")
    ledger = read_ledger(find_foreign(tmp_path))
    assert not ledger.notes()
    assert {linear.bits for linear in ledger.linears if "experts" in linear.name} == {8}
