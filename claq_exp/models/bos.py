"""Where a model's text begins: the beginning-of-text token in front of windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from claq_exp.errors import ConfigError
from claq_exp.models.towers import text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

TEXT, WINDOW, AUTO = "text", "window", "auto"
BOS_RULES = (AUTO, TEXT, WINDOW)


def bos_rule(wanted: str, config: PretrainedConfig) -> str:
    """Decide where the beginning-of-text token stands.

    text: where the tokenizer puts it by itself, i.e. at most once at the start of a text; the
        convention of GPTQ (arXiv 2210.17323) and of the papers that compare with it.
    window: at the start of every window, counted in its length.
    auto: window for the Gemma family, whose perplexity more than doubles without it, else text;
        lm-eval makes the same difference.
    """
    if wanted != AUTO:
        return wanted
    kinds = (config.model_type, text_config(config).model_type)
    return WINDOW if any("gemma" in kind for kind in kinds) else TEXT


def bos_token(rule: str, tokenizer: Tokenizer, where: str) -> int | None:
    """Return the token that begins every window, or None for the rule `text`.

    Raises ConfigError that names the config group `where` for a tokenizer without such a token.
    """
    if rule != WINDOW:
        return None
    if tokenizer.bos_token_id is None:
        raise ConfigError(
            f"{where}.bos={rule}: the model's tokenizer has no beginning-of-text token; "
            f"take {where}.bos={TEXT}"
        )
    return tokenizer.bos_token_id
