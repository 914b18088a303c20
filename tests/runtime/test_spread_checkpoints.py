"""A checkpoint that is spread over devices, packed or dense, computes what it does in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from quantized_checkpoints import write

from claq_exp.checkpoint.reader import open_checkpoint
from claq_exp.models.dispatch import loaded
from claq_exp.runtime.load import load_checkpoint

TOKENS = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("spread") / "checkpoint"
    return write(tiny_llama(), byte_tokenizer(), "model.layers", target)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


def test_weights_on_disk_are_dequantized_when_they_are_needed(folder):
    spread = loaded(open_checkpoint(folder), "auto", {"cpu": 1})
    assert set(spread.hf_device_map.values()) == {"disk"}
    assert torch.equal(logits(spread), logits(open_checkpoint(folder).load()))


@pytest.mark.parametrize("kernel", ["dense", "reference", "auto"])
def test_each_kernel_takes_a_device_map(folder, kernel):
    spread = load_checkpoint(folder, kernel=kernel, device_map="auto")
    assert torch.equal(logits(spread), logits(load_checkpoint(folder, kernel=kernel)))
