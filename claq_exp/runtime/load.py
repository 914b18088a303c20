"""Loads a packed checkpoint as a model, strictly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import claq_exp.runtime.huggingface  # noqa: F401 - teaches transformers the format
from claq_exp.checkpoint.reader import (
    check_checkpoint,
    check_dtype,
    check_model,
    open_checkpoint,
)
from claq_exp.errors import CheckpointError, ConfigError, one_of, telling_line
from claq_exp.run_folder.find import checkpoint_folder
from claq_exp.runtime.kernels import AUTO, DENSE, KERNEL
from claq_exp.runtime.linear import quantized_linears
from claq_exp.runtime.packed import packed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    kernel: str = AUTO,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint for inference; what is damaged or incomplete is refused.

    transformers' own `from_pretrained` gives the same model, but fills a missing tensor with
    random numbers and does not see a flipped bit.

    folder: of a checkpoint, or of the run that wrote it.
    dtype: of activations and of the weights that are not packed.  kernel: a name of
    `claq_exp.runtime.kernels.KERNEL`, "auto" for the fastest that passes its check, or "dense" for
    linear layers expanded to `dtype`.  device_map: spread it over all devices, as of
    `claq_exp.models.dispatch.loaded`.  trust_remote_code: run code that came with the original
    model; packed weights hold none.  Raises ConfigError for a folder that is no checkpoint and for
    a kernel that cannot be used here, CheckpointError for a checkpoint that is damaged.
    """
    folder = checkpoint_folder(folder)
    if kernel == DENSE:
        from claq_exp.models.dispatch import loaded

        opened = open_checkpoint(
            folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        return loaded(opened, device_map)
    if kernel not in (AUTO, *KERNEL):
        raise ConfigError(one_of("kernel", kernel, [AUTO, DENSE, *KERNEL]))
    layouts = check_checkpoint(folder, trust_remote_code=trust_remote_code)
    empty = check_model(folder, layouts, trust_remote_code=trust_remote_code)
    check_dtype(folder, layouts, dtype)
    model = _from_pretrained(type(empty), folder, dtype, device_map, trust_remote_code)
    if set(packed_modules(model)) != set(layouts):
        raise CheckpointError(f"{folder} did not load as packed; its config.json does not fit")
    model = (model if device_map else model.to(device)).eval()
    for name, layer in quantized_linears(model).items():
        layer.kernel = kernel
        try:
            layer.chosen_kernel()
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {name}: {error}") from error
    return model


def _from_pretrained(
    factory: Any, folder: Path, dtype: str, device_map: str | None, trust_remote_code: bool
) -> Any:
    from claq_exp.models.load import DTYPES

    try:
        model, report = factory.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            device_map=device_map,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # what a config asks for can fail anywhere in a model's code
        raise CheckpointError(f"{folder} cannot be loaded: {telling_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(map(str, report[what])):
            kind = what.partition("_")[0]
            raise CheckpointError(f"{folder} has {len(wrong)} {kind} tensors, e.g. {wrong[0]}")
    return model
