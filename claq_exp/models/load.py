"""Models and tokenizers in memory, and how text becomes tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from claq_exp.errors import ConfigError, SourceError, telling_line
from claq_exp.models.discover import LINEAR
from claq_exp.models.experts import router_weights
from claq_exp.models.flow import check_flow
from claq_exp.models.original import Original, check_strictly, look, weights_of
from claq_exp.models.skeleton import read_generation_config, skeleton
from claq_exp.models.stored_types import check_held
from claq_exp.models.stream import StreamedModel
from claq_exp.models.weights import StoredWeights
from claq_exp.models.wide import FLOAT64

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPENED = {**DTYPES, FLOAT64: torch.float64}  # see `calibration.float64`


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read config.json.  Raises ConfigError when it asks for code that is not allowed to run."""
    return _read(AutoConfig, folder, trust_remote_code=trust_remote_code)


def look_at(folder: Path, *, trust_remote_code: bool = False, strict: bool = False) -> Original:
    """Read config.json of an original model, and what its stored tensors say beside it.

    Raises as `load_config` and `look`, and where `strict` as `check_strictly`.
    """
    original = look(folder, load_config(folder, trust_remote_code=trust_remote_code))
    if strict:
        check_strictly(original)
    return original


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
    found: Callable[[Original], None] = lambda _: None,
) -> StreamedModel:
    """Open the model of a Hugging Face folder, to be read block by block, and check it.

    Experts are split.  work: folder for what must be converted before it can be read.
    check: without, what needs a look at all weights is left out, for a model that was checked.
    found: called with what is known of the model when its weights are found and checked.
    Raises ConfigError for a model that is already quantized or cannot be run block by block,
    SourceError when a tensor is missing, NumericalError for weights that are not finite, or that
    their type in forward passes or in the checkpoint cannot hold.
    """
    original = look_at(folder, trust_remote_code=trust_remote_code)
    weights = weights_of(original, work, trust_remote_code=trust_remote_code)
    whole = skeleton(original.config, OPENED[dtype])
    read_generation_config(whole, folder)
    model = StreamedModel(whole, weights, device, blocks_path, stored_dtype(original.config))
    if check:
        original = replace(original, too_small=_check_numbers(model, weights, original, dtype))
    found(original)
    if check:
        check_flow(model, str(folder))
    return model


def _check_numbers(
    model: StreamedModel, weights: StoredWeights, original: Original, dtype: str
) -> tuple[str, ...]:
    """Read every weight once, and return those that are too small for a type that they meet.

    Raises NumericalError as `check_held`.
    """
    stored = stored_dtype(original.config)
    packed = {
        f"{model.path}.{index}.{name}.weight"
        for index, block in enumerate(model.blocks)
        for name, module in block.named_modules()
        if isinstance(module, LINEAR) and f"{name}.weight" not in router_weights(block)
    }
    kept = model.model.state_dict().keys() - packed
    rescale, place = "rescale the weights", original.folder / "config.json"
    wider = rescale if dtype == "float32" else "set model.dtype=float32"
    run_in = (DTYPES[dtype], f"which model.dtype={dtype} asks for; {wider}")
    pack_in = (torch.float16, f"in which levels and outliers are stored; {rescale}")
    too_small = []
    for name in weights:
        weight = weights.read(name)
        fits = next((n for n, t in DTYPES.items() if t == weight.dtype), "float32")
        wider = rescale if stored == torch.float32 else f'write "dtype": "{fits}" into {place}'
        keep_in = (stored, f"which the checkpoint keeps this tensor in; {wider}")
        if check_held(name, weight, (run_in, keep_in if name in kept else pack_in)):
            too_small.append(name)
    return tuple(too_small)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder."""
    return _read(AutoTokenizer, folder, trust_remote_code=trust_remote_code)


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype of what a checkpoint keeps: that of the stored weights.

    float16 where the config does not say, float32 where it says another than these.
    """
    if not isinstance(config.dtype, torch.dtype):
        return torch.float16
    return config.dtype if config.dtype in DTYPES.values() else torch.float32


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
        raise SourceError(f"{folder} cannot be loaded: {telling_line(error)}") from error
