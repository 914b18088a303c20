"""Scales move from norms into the matrices behind them, and the model computes the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_architectures import ARCHITECTURES, token_batches

from claq_exp.models.blocks import capture_inputs, run_block
from claq_exp.models.stream import WholeModel
from claq_exp.transform.folding import find_folds
from claq_exp.transform.smooth import Smooth

ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj"}
EXPERTS = {f"mlp.experts.{i}.{layer}_proj" for i in range(8) for layer in ("gate", "up")}
LLAMA = {"input_layernorm": ATTENTION, "post_attention_layernorm": MLP}
GEMMA = {"input_layernorm": ATTENTION, "pre_feedforward_layernorm": MLP}
EXPECTED = {
    "llama": LLAMA,
    "llama_tied_biased": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gpt2": {"ln_1": {"attn.c_attn"}, "ln_2": {"mlp.c_fc"}},
    "opt": {"self_attn_layer_norm": ATTENTION, "final_layer_norm": {"fc1"}},
    "opt_350m": {},  # norms come after the residual sum, which goes on beside the matrices
    "gpt_neox": {
        "input_layernorm": {"attention.query_key_value"},
        "post_attention_layernorm": {"mlp.dense_h_to_4h"},
    },
    "gpt_neox_serial": {
        "input_layernorm": {"attention.query_key_value"},
        "post_attention_layernorm": {"mlp.dense_h_to_4h"},
    },
    "phi": {"input_layernorm": ATTENTION | {"mlp.fc1"}},
    "mixtral": {"input_layernorm": ATTENTION, "post_attention_layernorm": {"mlp.gate"} | EXPERTS},
    "qwen3_moe": {"input_layernorm": ATTENTION, "post_attention_layernorm": {"mlp.gate"} | EXPERTS},
    "qwen2_moe": {
        "input_layernorm": ATTENTION,
        "post_attention_layernorm": {"mlp.gate", "mlp.shared_expert_gate"}
        | {f"mlp.shared_expert.{layer}_proj" for layer in ("gate", "up")}
        | EXPERTS,
    },
}


@pytest.fixture(params=ARCHITECTURES)
def opened(request):
    model = WholeModel(ARCHITECTURES[request.param].build().double())
    return request.param, model


@torch.no_grad()
def test_the_norms_that_feed_matrices_alone_are_found(opened):
    name, model = opened
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    inputs = capture_inputs(model, token_batches())
    found = find_folds(model.blocks[0], inputs[0])
    assert {fold.norm: set(fold.consumers) for fold in found} == EXPECTED[name]
    assert {fold.offset for fold in found} <= ({1.0} if name.startswith("gemma") else {0.0})
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, before[key]), key


@torch.no_grad()
@pytest.mark.parametrize("rounded", [None, torch.float16, torch.bfloat16])
def test_a_smoothed_model_computes_the_same(opened, rounded, monkeypatch):
    _, model = opened
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # Gemma's norms narrow
    batches = token_batches()
    expected = [model.model(batch, use_cache=False).logits for batch in batches]
    inputs = capture_inputs(model, batches)
    hidden = list(inputs[0].hidden)
    for index, block in enumerate(model.blocks):
        inputs[index].hidden = hidden
        moves = Smooth().run(block, inputs[index])
        stored = (lambda value: value) if rounded is None else (lambda value: value.to(rounded))
        for move in moves:
            norm = move.norm(block, stored)
            for name, factor in move.columns(block, norm).items():
                block.get_parameter(name).mul_(factor)
            for name, value in norm.items():
                block.get_parameter(name).copy_(value)
        hidden = [run_block(block, inputs[index], batch) for batch in range(len(batches))]
    biased = any(isinstance(module, nn.LayerNorm) for module in model.model.modules())
    close = 1e-9 if rounded is None else 1e-7 if not biased else 0.05
    for batch, logits in zip(batches, expected, strict=True):
        found = model.model(batch, use_cache=False).logits
        assert (found - logits).norm() <= close * logits.norm()
