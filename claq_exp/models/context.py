"""How many tokens a model takes at once, and which."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig

from claq_exp.errors import ConfigError
from claq_exp.models.towers import text_config


def context_length(wanted: int | str, model_config: PretrainedConfig) -> int:
    """Return the tokens of a window for perplexity; `model` means the model's own context.

    Raises ConfigError for more than the model takes, or for `model` where it does not say.
    """
    if isinstance(wanted, int):
        check_context("evaluation.context", wanted, model_config)
        return wanted
    context = _model_context(model_config)
    if context is None:
        raise ConfigError(
            f"evaluation.context=model: {model_config.model_type} states no context length; "
            "give a number of tokens"
        )
    return context


def check_context(where: str, seqlen: int, model_config: PretrainedConfig) -> None:
    """Raise ConfigError that names the key `where` when a window is longer than the model takes."""
    context = _model_context(model_config)
    if context is not None and seqlen > context:
        raise ConfigError(f"{where} is {seqlen}, the model's context {context}; lower it")


def check_vocabulary(where: str, windows: Tensor, model_config: PretrainedConfig) -> None:
    """Raise ConfigError that names the key `where` when a token is none of the model's."""
    size = getattr(text_config(model_config), "vocab_size", None)
    largest = int(windows.max())
    if size is not None and largest >= size:
        raise ConfigError(
            f"{where}: the tokenizer gives token {largest}, the model's vocabulary has {size}; "
            "they do not belong together"
        )


def _model_context(model_config: PretrainedConfig) -> int | None:
    return getattr(text_config(model_config), "max_position_embeddings", None)
