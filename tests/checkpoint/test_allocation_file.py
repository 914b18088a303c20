"""What was decided of a model comes back from its file as it was, or not at all."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from claq_exp.allocate.plans_file import load_plans, save_plans
from claq_exp.errors import CheckpointError
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import Codebook, KMeans, KMeansExact, Uniform


@dataclass(frozen=True)
class Own(KMeans):
    """A codebook of a person's own, which is found by its module."""

    size: int = 1


def plan(codebook: Codebook, row_weights: torch.Tensor | None, **more: str) -> MatrixPlan:
    bits = torch.tensor([1, 8, 3], dtype=torch.uint8)
    return MatrixPlan(codebook, ColumnPlan(bits, torch.tensor([0, 5, 2]), **more), row_weights)


PLANS = {
    "model.layers.0.q": plan(KMeans(shared=True, row_scales=True), torch.rand(7)),
    "model.layers.0.k": plan(KMeansExact(fit_reserved=True), None, select="tails"),
    "model.layers.0.v": plan(Uniform(group_size=32), None),
    "model.layers.0.o": plan(Own(size=3), None),
}


def test_plans_come_back_as_they_were(tmp_path):
    path = tmp_path / "allocation.safetensors"
    save_plans(path, PLANS)
    found = load_plans(path)
    assert list(found) == list(PLANS)
    for name, expected in PLANS.items():
        assert found[name].codebook == expected.codebook
        assert found[name].columns.select == expected.columns.select
        assert torch.equal(found[name].columns.column_bits, expected.columns.column_bits)
        assert torch.equal(found[name].columns.reserved_counts, expected.columns.reserved_counts)
        if expected.row_weights is None:
            assert found[name].row_weights is None
        else:
            assert torch.equal(found[name].row_weights, expected.row_weights)


@pytest.mark.parametrize("size", [0, 5, 100])
def test_a_damaged_file_is_refused_by_name(tmp_path, size):
    path = tmp_path / "allocation.safetensors"
    save_plans(path, PLANS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"allocation\.safetensors.*resume=never"):
        load_plans(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_plans(tmp_path / "none.safetensors")
