"""A model's structure without its weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from claq_exp.errors import SourceError, telling_line
from claq_exp.models.experts import split_experts
from claq_exp.models.towers import model_factory, runs_own_code, text_config
from claq_exp.models.wide import wide_passes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_LAYERS = 1 << 12
LARGEST = 1 << 26  # entries of a vocabulary, positions, width of a layer


def skeleton(
    config: PretrainedConfig, dtype: torch.dtype | None = None, *, split: bool = True
) -> PreTrainedModel:
    """Build the language model of a config with its parameters on the meta device.

    Buffers, which are computed and not read, are there.  dtype: of the parameters, None for the
    config's.  split: take experts apart.  Raises ConfigError for any other kind of model,
    SourceError for a config that makes none.
    """
    from accelerate import init_empty_weights

    factory, remote = model_factory(config), runs_own_code(config)
    options = {} if dtype is None else {"dtype": dtype}
    _check_counts(config)
    try:
        with init_empty_weights(), wide_passes(dtype):  # tables of positions are made here
            own = copy.deepcopy(config)  # it is given the dtype
            model: PreTrainedModel = factory.from_config(own, trust_remote_code=remote, **options)
    except Exception as error:
        name = config.name_or_path or "the model"
        raise SourceError(f"{name}: its config makes no model: {telling_line(error)}") from error
    if split:
        split_experts(model)
    return model.eval()


def _check_counts(config: PretrainedConfig) -> None:
    """Raise SourceError for a size that no model has, before it takes memory or time."""
    counts = {
        "layers": MOST_LAYERS,
        **dict.fromkeys(("size", "dim", "heads", "embeddings"), LARGEST),
    }
    for key, value in text_config(config).to_dict().items():
        most = counts.get(key.rpartition("_")[2])
        if most is not None and isinstance(value, int) and value > most:
            name = config.name_or_path or "the model"
            raise SourceError(f"{name}: its config asks for {key}={value}, more than any model has")


def read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the settings for generation that its folder holds, if any.

    Raises SourceError where they cannot be read.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise SourceError(f"{path} cannot be read: {telling_line(error)}") from error


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the parameters that only rename another one, e.g. a tied head: name -> the other."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is not None:  # by the config of each part of the model
        return dict(tied)
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    # code that came with the model, and is older than this entry
    return dict.fromkeys(getattr(model, "_tied_weights_keys", None) or (), _embedding(model))


def _embedding(model: PreTrainedModel) -> str:
    table = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is table)


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
