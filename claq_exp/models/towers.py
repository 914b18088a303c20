"""Which class of transformers a config makes, and where in it the text tower stands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from claq_exp.errors import ConfigError, SourceError, telling_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

CODE_PACKAGE = "transformers_modules"  # where transformers puts code that came with a model
TOWERS = "AutoModelForMultimodalLM"  # text beside images, video or sound
TEXT = "AutoModelForCausalLM"


def runs_own_code(part: object) -> bool:
    """Tell whether the class of a config or tokenizer came with the model; it was allowed then."""
    return type(part).__module__.startswith(CODE_PACKAGE)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the text tower, or the whole.

    Raises SourceError where transformers cannot tell.
    """
    try:
        return config.get_text_config()
    except Exception as error:  # a config that says nonsense can fail anywhere in another's code
        name = config.name_or_path or "the model"
        raise SourceError(
            f"{name}: its config names no text model: {telling_line(error)}"
        ) from error


def model_factory(config: PretrainedConfig) -> Any:
    """Return the auto class of transformers that makes the language model of a config.

    A config of several towers makes the model that has them all, unless its `architectures` name
    the causal one.  Raises ConfigError for a model without a language head, or with an encoder.
    """
    import transformers

    about = f"{config.name_or_path or 'the model'} ({config.model_type})"
    own_code = runs_own_code(config)
    if getattr(config, "is_encoder_decoder", False) and not own_code:
        raise ConfigError(
            f"{about} is no causal language model: it is an encoder-decoder model, whose blocks "
            "take an encoder's output besides hidden states; give a decoder"
        )
    text, towers = getattr(transformers, TEXT), getattr(transformers, TOWERS)
    several = type(text_config(config)) is not type(config)
    factories = [towers, text] if several else [text, towers]
    if own_code:
        asked = getattr(config, "auto_map", None) or {}
        return next((f for f in factories if f.__name__ in asked), text)
    able = [factory for factory in factories if type(config) in factory._model_mapping]
    if not able:
        raise ConfigError(
            f"{about} is no causal language model: neither {TEXT} nor {TOWERS} of transformers "
            f"takes a {type(config).__name__}"
        )
    wanted = set(getattr(config, "architectures", None) or ())
    return next((f for f in able if f._model_mapping[type(config)].__name__ in wanted), able[0])


def text_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """Return (name, module) of the text tower: the outermost module that the text config made.

    A model that has no other towers is one as a whole, and its name "".
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        kind = type(text_config(model.config))
        for name, module in model.named_modules():
            if isinstance(module, PreTrainedModel) and isinstance(module.config, kind):
                return name, module
    return "", model


def other_towers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that text does not pass through: towers for images, video and sound."""
    from transformers import PreTrainedModel

    name, tower = text_tower(model)
    around = {model, tower, *(model.get_submodule(part) for part in _above(name))}
    inside = set(tower.modules())
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module not in inside and module not in around
    ]


def _above(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]
