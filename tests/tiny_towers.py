"""Random models of text and images or sound, a few thousand weights each, from configs alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE = 60  # the token that stands for a part of an image
IMAGE_TOKENS = 4
SIZE, PATCH = 16, 8
TEXT = {
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Wider and deeper than the text tower: the list that holds most weights is not the one to quantize.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}
QWEN_VISION = {
    "depth": 3,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
QWEN_PIXELS = {
    "pixel_values": (16, 48),
    "image_grid_thw": [[1, 4, 4]],
    "mm_token_type_ids": [[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]],
}


@dataclass(frozen=True)
class Towers:
    """A kind of model, its text tower and the others.

    image: shapes or values of what a forward pass takes beside token ids; none where it is not
    tried.
    """

    text: dict[str, Any]
    others: dict[str, Any]
    blocks: str = "model.language_model.layers"
    image: dict[str, Any] = field(default_factory=dict)

    def build(self, kind: str, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[kind](text_config={**TEXT, **self.text}, **self.others)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
        return model

    def seen(self) -> dict[str, Tensor]:
        """Token ids with an image among them, and its pixels."""
        dice = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, 50, (1, 10), generator=dice)
        tokens[0, 2 : 2 + IMAGE_TOKENS] = IMAGE
        return {"input_ids": tokens} | {
            name: torch.randn(value, generator=dice)
            if isinstance(value, tuple)
            else torch.tensor(value)
            for name, value in self.image.items()
        }


def vision(kind: str, **options: Any) -> dict[str, Any]:
    return {"model_type": kind, **VISION, **options}


PIXELS = {"pixel_values": (1, 3, SIZE, SIZE)}
TOWERS = {
    "qwen2_vl": Towers(
        {"model_type": "qwen2_vl_text", "rope_parameters": MROPE},
        {
            "vision_config": {**QWEN_VISION, "embed_dim": 32, "hidden_size": 24, "mlp_ratio": 3},
            **QWEN_TOKENS,
        },
        image=QWEN_PIXELS,
    ),
    "qwen3_vl": Towers(
        {"model_type": "qwen3_vl_text", "rope_parameters": MROPE},
        {
            "vision_config": {
                **QWEN_VISION,
                "hidden_size": 32,
                "out_hidden_size": 24,
                "intermediate_size": 96,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **QWEN_TOKENS,
        },
        image=QWEN_PIXELS,
    ),
    "llava": Towers(
        {"model_type": "llama"},
        {"vision_config": vision("clip_vision_model"), "image_token_index": IMAGE},
        image=PIXELS,
    ),
    "mistral3": Towers(
        {"model_type": "mistral"},
        {
            "vision_config": vision("pixtral", head_dim=8),
            "image_token_index": IMAGE,
            "spatial_merge_size": 1,
        },
        image={**PIXELS, "image_sizes": [[SIZE, SIZE]]},
    ),
    "gemma3": Towers(
        {"model_type": "gemma3_text", "sliding_window": 5, "query_pre_attn_scalar": 6},
        {
            "vision_config": vision("siglip_vision_model"),
            "image_token_id": IMAGE,
            "image_token_index": IMAGE,
            "mm_tokens_per_image": IMAGE_TOKENS,
        },
        image=PIXELS,
    ),
    "idefics3": Towers(
        {"model_type": "llama"},
        {
            "vision_config": vision("idefics3_vision"),
            "image_token_id": IMAGE,
            "scale_factor": 1,
        },
        "model.text_model.layers",
        {"pixel_values": (1, 1, 3, SIZE, SIZE)},
    ),
    "qwen2_audio": Towers(
        {"model_type": "qwen2"},
        {
            "audio_config": {
                "d_model": 32,
                "encoder_layers": 3,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "num_mel_bins": 8,
                "max_source_positions": 16,
            },
            "audio_token_index": IMAGE,
        },
    ),
}
