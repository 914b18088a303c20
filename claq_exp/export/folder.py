"""What every format in a Hugging Face folder has: weights, config.json, the tokenizer's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from claq_exp.checkpoint.manifest import MANIFEST
from claq_exp.checkpoint.reader import read_unquantized
from claq_exp.sources.cache import published
from claq_exp.sources.companions import copy_file
from claq_exp.system.files import read_json, sync_folder, write_json
from claq_exp.tensor_files.shards import INDEX_FILE, SHARD_BYTES, Unit, save_units

REWRITTEN = {"config.json", INDEX_FILE}


def copy_companions(folder: Path, new: Path) -> None:
    """Copy the files of a checkpoint that are neither weights nor config, byte by byte."""
    for name in read_json(folder / MANIFEST)["files"]:
        if name not in REWRITTEN and not name.endswith(".safetensors"):
            copy_file(folder / name, new / name)


def kept_units(folder: Path, dtype: torch.dtype) -> Iterator[Unit]:
    """Yield what a checkpoint keeps unquantized, to be written in a dtype."""
    for name, tensor in read_unquantized(folder):
        yield Unit({name: tensor}, dtype)


def publish(
    folder: Path,
    target: Path,
    units: Iterable[Unit],
    quantization: Mapping[str, Any],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Publish a checkpoint with other weights by rename.

    units: all weights.  quantization: the new `quantization_config`.  dtype: of what is not packed.
    """
    config = read_json(folder / "config.json")
    config["quantization_config"] = dict(quantization)
    config["dtype"] = str(dtype).removeprefix("torch.")
    with published(target) as new:
        save_units(new, units, shard_bytes)
        write_json(new / "config.json", config)
        copy_companions(folder, new)
        sync_folder(new)
    sync_folder(target.parent)
