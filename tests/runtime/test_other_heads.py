"""Packed layers under another head than the causal one, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from quantized_checkpoints import write
from tiny_towers import TOWERS
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import claq_exp
from claq_exp.checkpoint.reader import read_layouts
from claq_exp.runtime.linear import quantized_linears

pytestmark = [pytest.mark.case(119)]

TOKENS = torch.arange(1, 25).reshape(2, 12)
MODELS = {
    "llama": (lambda: tiny_llama().float(), "model.layers"),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=24, n_head=4, n_layer=2, vocab_size=256)).eval(),
        "transformer.h",
    ),
    "llava": (lambda: TOWERS["llava"].build("llava"), "model.language_model.layers"),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build, blocks = MODELS[request.param]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    target = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return write(build(), tokenizer, blocks, target)


def last_hidden(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).last_hidden_state


def test_the_base_model_has_the_packed_layers_and_the_hidden_states(checkpoint, tmp_path):
    base, report = AutoModel.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert len(quantized_linears(base)) == len(read_layouts(checkpoint))
    whole = claq_exp.load(checkpoint)
    with torch.inference_mode():
        expected = whole(TOKENS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(last_hidden(base), expected)
    base.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(last_hidden(again), last_hidden(base))


def test_a_base_model_that_was_saved_again_gets_its_head_back(checkpoint, tmp_path):
    if "llava" in str(checkpoint):
        pytest.skip("its head is no part of what was saved")
    AutoModel.from_pretrained(checkpoint, dtype=torch.float32).save_pretrained(tmp_path)
    whole, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]  # its head is tied
    with torch.inference_mode():
        torch.testing.assert_close(whole(TOKENS).logits, claq_exp.load(checkpoint)(TOKENS).logits)


def test_a_classifier_stands_on_the_packed_layers(checkpoint):
    if "llava" in str(checkpoint):
        pytest.skip("transformers has no classifier for it")
    model, report = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, dtype=torch.float32, output_loading_info=True
    )
    assert report["missing_keys"] == {"score.weight"}
    assert len(quantized_linears(model)) == len(read_layouts(checkpoint))
    model.config.pad_token_id = 0
    with torch.inference_mode():
        assert model(TOKENS).logits.shape == (2, 3)
