"""A model's structure without its weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from claq_exp.errors import ConfigError
from claq_exp.models.experts import split_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model of a config on the meta device: shapes, no memory.

    Experts are split.  Raises ConfigError for any other kind of model.
    """
    from transformers import AutoModelForCausalLM

    remote = type(config).__module__.startswith("transformers_modules")  # allowed when it was read
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    except ValueError as error:
        name = config.name_or_path or "the model"
        raise ConfigError(f"{name} ({config.model_type}) is no causal language model") from error
    split_experts(model)
    return model


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the parameters that only rename another one, e.g. a tied head."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def dense_parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every stored tensor of the model, tied ones once."""
    model = skeleton(config)
    tied = tied_names(model)
    return {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }


def dense_parameter_count(config: PretrainedConfig) -> int:
    """Return the number of stored weights of the model, tied ones once."""
    return sum(math.prod(shape) for shape in dense_parameter_shapes(config).values())
