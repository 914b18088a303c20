"""Models that cannot be quantized block by block are refused with what was found, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_llama
from tiny_architectures import ARCHITECTURES
from tiny_towers import IMAGE, TEXT, TOWERS, vision
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
    T5Config,
    ViTConfig,
    WhisperConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from claq_exp.errors import ConfigError
from claq_exp.models.flow import check_flow
from claq_exp.models.skeleton import skeleton
from claq_exp.models.stream import WholeModel

pytestmark = pytest.mark.case(117)

GEMMA_3N = {
    **TEXT,
    "num_hidden_layers": 4,
    "intermediate_size": [40] * 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 256,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "sliding_window": 5,
}


def refusal(model: nn.Module) -> str:
    with pytest.raises(ConfigError) as caught:
        check_flow(WholeModel(model), "folder")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"folder ({model.config.model_type}) ")
    return message


def random_model(config: Any, factory: Any = AutoModelForCausalLM) -> PreTrainedModel:
    model = factory.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoders_whose_blocks_hand_on_hidden_states_are_taken(name):
    check_flow(WholeModel(ARCHITECTURES[name].build()), "folder")


@pytest.mark.parametrize("kind", TOWERS)
def test_text_towers_are_taken(kind):
    check_flow(WholeModel(TOWERS[kind].build(kind)), "folder")


def test_several_streams_of_hidden_states_are_told_by_their_shape():
    model = random_model(CONFIG_MAPPING["gemma3n_text"](**GEMMA_3N))
    message = refusal(model)
    assert "for 2 x 8 tokens its blocks take hidden states of 2 x 2 x 8 x 24" in message
    assert "no causal language model" not in message


def test_what_a_block_takes_of_the_tokens_besides_is_named():
    model = tiny_llama().float()
    tokens: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, keyword: (args, {**keyword, "per_layer_input": tokens[-1]}),
        with_kwargs=True,
    )
    assert "block 1 also takes 'per_layer_input', which changes with the tokens" in refusal(model)


@pytest.mark.parametrize("state", [{}, []], ids=["dict", "list"])
def test_what_blocks_write_to_is_named(state):
    model = tiny_llama().float()
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda _, args, keyword: (args, {**keyword, "shared_kv": state}), with_kwargs=True
        )
    assert "share what they compute by 'shared_kv'" in refusal(model)


def test_something_between_two_blocks_is_told():
    model = tiny_llama().float()
    model.model.layers[2].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    assert "block 2 does not take what block 1 returns" in refusal(model)


def test_blocks_that_run_twice_are_told():
    class Looped(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            return [*found, *found] if isinstance(index, slice) else found

    model = tiny_llama().float()
    model.model.layers = Looped(model.model.layers)
    assert "of its 3 blocks these run on text, in this order: 0, 1, 2, 0, 1, 2" in refusal(model)


def test_blocks_for_images_among_those_for_text_are_told():
    config = CONFIG_MAPPING["mllama"](
        text_config={**TEXT, "cross_attention_layers": [1]},
        vision_config=vision(
            "mllama_vision_model",
            attention_heads=4,
            vision_output_dim=64,
            num_global_layers=1,
            intermediate_layers_indices=[0],
        ),
    )
    model = random_model(config, AutoModelForMultimodalLM)
    assert "of its 2 blocks these run on text, in this order: 0" in refusal(model)


def test_a_prompt_that_sees_all_of_itself_is_no_causal_model():
    config = CONFIG_MAPPING["paligemma"](
        text_config={**TEXT, "model_type": "gemma"},
        vision_config=vision("siglip_vision_model", projection_dim=24),
        projection_dim=24,
        image_token_index=IMAGE,
    )
    message = refusal(random_model(config, AutoModelForMultimodalLM))
    assert "changes with the tokens that follow" in message


def test_a_model_that_does_not_run_on_tokens_alone_says_what_its_code_said():
    model = tiny_llama().float()

    def fail(*_: Any) -> None:
        raise ValueError("pixel_values must be given\nand so on")

    model.model.register_forward_pre_hook(fail)
    message = refusal(model)
    assert message.endswith("cannot be run on token ids alone: pixel_values must be given")


@pytest.mark.parametrize("config", [T5Config(), WhisperConfig()], ids=["t5", "whisper"])
def test_a_model_with_an_encoder_is_refused_for_that(config):
    with pytest.raises(ConfigError, match="encoder-decoder model"):
        skeleton(config)


def test_a_model_without_a_language_head_is_refused_with_what_was_asked():
    with pytest.raises(ConfigError, match=r"\(vit\).*AutoModelForCausalLM.*takes a ViTConfig"):
        skeleton(ViTConfig())
