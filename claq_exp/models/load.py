"""Models and tokenizers in memory, and how text becomes tokens."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from claq_exp.errors import ConfigError, SourceError, first_line
from claq_exp.models.flow import check_flow
from claq_exp.models.skeleton import read_generation_config, skeleton
from claq_exp.models.stream import StreamedModel
from claq_exp.models.weights import check_finite, stored_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read config.json.  Raises ConfigError when it asks for code that is not allowed to run."""
    return _read(AutoConfig, folder, trust_remote_code=trust_remote_code)


def load_model(
    folder: Path,
    *,
    dtype: str,
    device: str,
    work: Path | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Bring the model of a Hugging Face folder into memory, in evaluation mode, onto `device`.

    Checked as in `open_model`.  work: as there; a temporary folder by default.
    """
    with TemporaryDirectory() if work is None else nullcontext(work) as place:
        opened = open_model(
            folder, Path(place), dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        return opened.load()


def open_model(
    folder: Path,
    work: Path,
    *,
    dtype: str,
    device: str,
    blocks_path: str | None = None,
    trust_remote_code: bool = False,
    check: bool = True,
) -> StreamedModel:
    """Open the model of a Hugging Face folder, to be read block by block, and check it.

    Experts are split.  work: folder for what must be converted before it can be read.
    check: without, what needs a look at all weights is left out, for a model that was checked.
    Raises ConfigError for a model that is already quantized or cannot be run block by block,
    SourceError when a tensor is missing, NumericalError for weights that are not finite.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{folder} is already quantized; give the original model")
    weights = stored_weights(folder, config, work, trust_remote_code=trust_remote_code)
    if check:
        check_finite(weights)
    whole = skeleton(config, DTYPES[dtype])
    read_generation_config(whole, folder)
    model = StreamedModel(whole, weights, device, blocks_path)
    if check:
        check_flow(model, str(folder))
    return model


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
    except Exception as error:  # a file that says nonsense can fail anywhere in another's code
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{folder} asks to run code of its own; set model.trust_remote_code=true to "
                "allow it"
            ) from error
        raise SourceError(f"{folder} cannot be loaded: {first_line(error)}") from error
