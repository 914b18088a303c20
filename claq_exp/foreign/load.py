"""Loads a checkpoint of another owner as a model in memory, through transformers and that owner."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from claq_exp.errors import CheckpointError, ClaqError, ConfigError, telling_line
from claq_exp.foreign.found import DENSE, Foreign, check_package
from claq_exp.models.dispatch import input_device, loaded
from claq_exp.models.gguf import converted
from claq_exp.models.load import DTYPES, load_config, load_tokenizer, open_model
from claq_exp.models.source import ModelSource, model_folder
from claq_exp.models.towers import model_factory
from claq_exp.sources.companions import TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_TOKENIZER = frozenset({"tokenizer_config.json"})  # settings of one, which lies elsewhere


def model_files(foreign: Foreign) -> Path:
    """Return the folder that is loaded: of GGUF and pickled dense files a form in the cache.

    Raises SourceError for a GGUF file that transformers does not read.
    """
    if foreign.is_gguf:
        return converted(foreign.path, None, lambda _: None)
    if foreign.method == DENSE:
        return model_folder(ModelSource(str(foreign.path.resolve())))
    return foreign.path


def find_tokenizer(
    foreign: Foreign, folder: Path, model: ModelSource | None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return a checkpoint's own tokenizer, or that of `model` where it has none.

    folder: of `model_files`.  Raises ConfigError where there is neither.
    """
    names = {path.name for pattern in TOKENIZER for path in folder.glob(pattern)}
    if names - NO_TOKENIZER:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if model is None:
        raise ConfigError(f"{foreign.path} has no tokenizer; name the original with model=...")
    return load_tokenizer(model_folder(model, weights=False), trust_remote_code=trust_remote_code)


def load_foreign(
    foreign: Foreign,
    *,
    dtype: str,
    device: str,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint in evaluation mode, whole; nothing of its format is known here.

    dtype: of the forward passes; what the owner's layers cannot run in, they change.
    Raises ConfigError where the owner's package is missing, CheckpointError where it fails or
    leaves a tensor without its stored numbers.
    """
    check_package(foreign)
    place: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if foreign.is_gguf or foreign.method == DENSE:
        with ExitStack() as stack:
            work = Path(stack.enter_context(TemporaryDirectory()))
            opened = open_model(model_files(foreign), work, device=device, **place)
            return loaded(opened, device_map)
    try:
        if foreign.is_pickled_hqq:
            model = _by_hqq(foreign, dtype, device)
        else:
            model = _by_transformers(foreign, device=device, device_map=device_map, **place)
        with torch.inference_mode():  # some layers refuse their shapes only when they run
            model(torch.zeros(1, 2, dtype=torch.int64, device=input_device(model)), use_cache=False)
    except ImportError as error:
        raise ConfigError(
            f"{foreign.path} cannot be loaded, a package is missing: {telling_line(error)}"
        ) from error
    except ClaqError:
        raise
    except Exception as error:  # another's code, another's file
        raise CheckpointError(
            f"{foreign.path} ({foreign.method}) cannot be loaded and run here: "
            f"{telling_line(error)}"
        ) from error
    return model


def _by_transformers(
    foreign: Foreign, *, dtype: str, device: str, device_map: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    config = load_config(foreign.path, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {}
    if foreign.has_packed_zeros():
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model, report = model_factory(_plain(config)).from_pretrained(
        foreign.path,
        dtype=DTYPES[dtype],
        device_map=device_map or {"": device},
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the message can name the tensor
        trust_remote_code=trust_remote_code,
        **options,
    )
    by = f"transformers and {foreign.method}"
    if wrong := sorted(map(str, report["mismatched_keys"])):
        raise CheckpointError(
            f"{foreign.path}: {by} expect another shape of {len(wrong)} tensors, e.g. {wrong[0]}"
        )
    if wrong := sorted(map(str, report["missing_keys"])):
        raise CheckpointError(f"{foreign.path}: {by} miss {len(wrong)} tensors, e.g. {wrong[0]}")
    whole: PreTrainedModel = model.eval()
    return whole


def _plain(config: Any) -> Any:
    """Return a config without its quantization, which the choice of a class must not depend on."""
    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    return plain


def _by_hqq(foreign: Foreign, dtype: str, device: str) -> PreTrainedModel:
    """Load what `save_quantized` of hqq wrote: transformers does not read it."""
    from hqq.models.hf.base import AutoHQQHFModel

    model: PreTrainedModel = AutoHQQHFModel.from_quantized(
        str(foreign.path), compute_dtype=DTYPES[dtype], device=device
    )
    return model.eval()
