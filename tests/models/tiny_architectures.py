"""Random models of several architectures, a few thousand weights each, from their configs alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from claq_exp.models.experts import fuse_experts, split_experts
from claq_exp.models.load import open_model
from claq_exp.models.stream import StreamedModel

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_GROUPS = [
    ATTENTION,
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
LLAMA_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
OPT_SIZES = {"hidden_size": 24, "ffn_dim": 40, "num_attention_heads": 4}
OPT_GROUPS = [ATTENTION, ("self_attn.out_proj",), ("fc1",), ("fc2",)]
NEOX_SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
NEOX_GROUPS = [
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
]
EXPERTS = 8
EXPERT_GROUPS = [
    tuple(f"mlp.experts.{index}.{layer}_proj" for layer in layers)
    for layers in (("gate", "up"), ("down",))
    for index in range(EXPERTS)
]


@dataclass(frozen=True)
class Architecture:
    """A kind of model, its sizes, where its blocks stand, and the groups of each."""

    kind: str
    options: dict[str, object]
    blocks: str
    groups: list[tuple[str, ...]] = field(default_factory=lambda: LLAMA_GROUPS)
    depth: int = 2

    def linears(self) -> list[str]:
        """Full names of all linears of the blocks, in execution order."""
        names = [name for group in self.groups for name in group]
        return [f"{self.blocks}.{index}.{name}" for index in range(self.depth) for name in names]

    def build(self, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        shared = {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 0}
        shared |= {"eos_token_id": 0, "pad_token_id": 0, "num_hidden_layers": self.depth}
        config = CONFIG_MAPPING[self.kind](**{**shared, **self.options})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        split_experts(model)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
            elif "norm" in name or "ln_" in name:
                nn.init.normal_(parameter, mean=1.0, std=0.2)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
        return model


ARCHITECTURES = {
    "llama": Architecture("llama", LLAMA_SIZES, "model.layers", depth=3),
    "llama_tied_biased": Architecture(
        "llama",
        {**LLAMA_SIZES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "model.layers",
    ),
    "qwen2": Architecture("qwen2", LLAMA_SIZES, "model.layers"),
    "mistral": Architecture(
        "mistral", {**LLAMA_SIZES, "sliding_window": 5}, "model.layers", depth=3
    ),
    "gemma2": Architecture(
        "gemma2", {**LLAMA_SIZES, "sliding_window": 5, "query_pre_attn_scalar": 6}, "model.layers"
    ),
    "gpt2": Architecture(
        "gpt2",
        {"n_embd": 24, "n_head": 4, "n_positions": 64},
        "transformer.h",
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    ),
    "opt": Architecture(
        "opt",
        {**OPT_SIZES, "word_embed_proj_dim": 24},
        "model.decoder.layers",
        OPT_GROUPS,
    ),
    "opt_350m": Architecture(
        "opt",
        {**OPT_SIZES, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        "model.decoder.layers",
        OPT_GROUPS,
    ),
    "gpt_neox": Architecture("gpt_neox", NEOX_SIZES, "gpt_neox.layers", NEOX_GROUPS),
    "gpt_neox_serial": Architecture(
        "gpt_neox", {**NEOX_SIZES, "use_parallel_residual": False}, "gpt_neox.layers", NEOX_GROUPS
    ),
    "phi": Architecture(
        "phi",
        {**NEOX_SIZES, "num_attention_heads": 3, "partial_rotary_factor": 0.5},
        "model.layers",
        [(*ATTENTION, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)],
    ),
    "qwen3": Architecture("qwen3", LLAMA_SIZES, "model.layers"),
    "gemma3": Architecture(
        "gemma3_text",
        {
            **LLAMA_SIZES,
            "sliding_window": 5,
            "query_pre_attn_scalar": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "model.layers",
        depth=3,
    ),
    "mixtral": Architecture(
        "mixtral",
        {**LLAMA_SIZES, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        "model.layers",
        [*LLAMA_GROUPS[:2], *EXPERT_GROUPS],
    ),
    "qwen2_moe": Architecture(
        "qwen2_moe",
        {
            **LLAMA_SIZES,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
        },
        "model.layers",
        [
            *LLAMA_GROUPS[:2],
            ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
            ("mlp.shared_expert.down_proj",),
            *EXPERT_GROUPS,
        ],
    ),
    "qwen3_moe": Architecture(
        "qwen3_moe",
        {
            **LLAMA_SIZES,
            "moe_intermediate_size": 16,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [],
        },
        "model.layers",
        [*LLAMA_GROUPS[:2], *EXPERT_GROUPS],
    ),
}


def token_batches(batches: int = 2, size: int = 2, seqlen: int = 12, seed: int = 0) -> list[Tensor]:
    """Random token ids, [size, seqlen] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (size, seqlen), generator=generator) for _ in range(batches)]


def saved(name: str, place: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a model of an architecture into a folder, as transformers stores it."""
    model = ARCHITECTURES[name].build()
    fuse_experts(model)
    model.to(dtype).save_pretrained(place)
    return place


def streamed(folder: Path, work: Path) -> StreamedModel:
    """Open a model in a folder, to be read block by block."""
    return open_model(folder, work, dtype="float32", device="cpu")
