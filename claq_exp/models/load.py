"""Models and tokenizers in memory, and how text becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from claq_exp.errors import ConfigError, NumericalError, SourceError, first_line
from claq_exp.models.experts import split_experts

AHEAD = 0.05  # relative change of logits that is no rounding, be it of bfloat16
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read config.json.  Raises ConfigError when it asks for code that is not allowed to run."""
    return _read(AutoConfig, folder, trust_remote_code=trust_remote_code)


def load_model(folder: Path, *, dtype: str, device: str, trust_remote_code: bool = False) -> Model:
    """Load the model of a Hugging Face folder, in evaluation mode, onto `device`.

    Experts are split.  Raises ConfigError for a model that is already quantized or looks ahead,
    SourceError when a tensor is missing.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{folder} is already quantized; give the original model")
    model, report = _read(
        AutoModelForCausalLM,
        folder,
        dtype=DTYPES[dtype],
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that the message can name the tensor
    )
    if mismatched := sorted(str(key) for key in report["mismatched_keys"]):
        raise SourceError(
            f"{folder} holds tensors of another shape than its config: {mismatched[0]}"
        )
    if missing := sorted(report["missing_keys"]):
        raise SourceError(f"{folder} lacks {len(missing)} tensors of its model, e.g. {missing[0]}")
    split_experts(model)
    _check_finite(model)
    model = model.to(device).eval()
    if _looks_ahead(model):
        raise ConfigError(
            f"{folder} ({config.model_type}) is no causal language model: what it predicts after a "
            "token changes with the tokens that follow; give a decoder"
        )
    return model


@torch.inference_mode()
def _looks_ahead(model: Model) -> bool:
    """Tell whether a later token changes an earlier prediction, as in encoders such as BERT."""
    tokens = torch.tensor([[1, 2] + [later] * 6 for later in (1, 2)], device=model.device)
    first, second = model(tokens, use_cache=False).logits[:, 1].float()
    return bool((first - second).norm() > AHEAD * first.norm())


def _check_finite(model: Model) -> None:
    for name, weight in model.named_parameters():
        finite = torch.isfinite(weight)
        if not finite.all():
            place = torch.nonzero(~finite)[0].tolist()
            value = weight[tuple(place)].item()
            raise NumericalError(f"{name}{place} is {value}; repair the model's weights")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder."""
    return _read(AutoTokenizer, folder, trust_remote_code=trust_remote_code)


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype of the stored weights, float16 where the config does not say."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16


def forward_dtype(wanted: str, config: PretrainedConfig, device: str) -> str:
    """Return the name of the dtype for forward passes.

    auto: float32 on a CPU, which is fast in nothing else; on a GPU what the config says of the
    stored weights.  A config that says nothing is older than that entry, and its weights float32.
    """
    if wanted != "auto":
        return wanted
    stored = str(config.dtype).removeprefix("torch.")
    return stored if device != "cpu" and stored in DTYPES else "float32"


def tokenize(tokenizer: Tokenizer, text: str, *, special: bool = True) -> Tensor:
    """Return the token ids of a whole text: [n] int64.

    special: add special tokens as the tokenizer does by itself (Llama: one at the start of the
    text).
    """
    options = {"add_special_tokens": special, "verbose": False}
    ids = tokenizer(text, return_tensors="pt", **options).input_ids[0]
    return ids.to(torch.int64)


def _read(factory: Any, folder: Path, **options: Any) -> Any:
    try:
        return factory.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{folder} asks to run code of its own; set model.trust_remote_code=true to "
                "allow it"
            ) from error
        raise SourceError(f"{folder} cannot be loaded: {first_line(error)}") from error
