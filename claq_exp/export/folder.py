"""What every format in a Hugging Face folder has: weights, config, tokenizer, model card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from claq_exp.checkpoint.manifest import CARD, MANIFEST
from claq_exp.checkpoint.reader import read_unquantized
from claq_exp.reporting.card import exported_card
from claq_exp.sources.cache import published
from claq_exp.sources.companions import copy_file
from claq_exp.system.files import read_json, sync_folder, write_json
from claq_exp.tensor_files.shards import INDEX_FILE, SHARD_BYTES, Unit, save_units

REWRITTEN = {"config.json", INDEX_FILE}
WAYS = {  # format -> what its folder holds, and how it is loaded
    "dense": "dense weights, which transformers and other programs load as any model",
    "gptq": "the GPTQ layout, for vLLM, SGLang, GPTQModel and transformers",
    "compressed-tensors": "the layout `pack-quantized` of compressed-tensors, for vLLM, and for "
    "transformers with `CompressedTensorsConfig(dequantize=True)`",
}


def copy_companions(folder: Path, new: Path, format_: str) -> None:
    """Copy the files of a checkpoint that are neither weights nor config, byte by byte.

    Its model card, where there is one, says what the new folder is.
    """
    for name in read_json(folder / MANIFEST)["files"]:
        if name not in REWRITTEN and not name.endswith(".safetensors"):
            copy_file(folder / name, new / name)
    if (folder / CARD).is_file():
        about = (
            f"It holds {WAYS[format_]}. `claq-exp export format={format_}` wrote it; bits and size "
            "above are those of the packed checkpoint."
        )
        card = (folder / CARD).read_text(encoding="utf-8")
        (new / CARD).write_text(exported_card(card, about), encoding="utf-8")


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

    units: all weights.  quantization: the new `quantization_config`; its `quant_method` is the name
    of the format.  dtype: of what is not packed.
    """
    config = read_json(folder / "config.json")
    config["quantization_config"] = dict(quantization)
    config["dtype"] = str(dtype).removeprefix("torch.")
    with published(target) as new:
        save_units(new, units, shard_bytes)
        write_json(new / "config.json", config)
        copy_companions(folder, new, quantization["quant_method"])
        sync_folder(new)
    sync_folder(target.parent)
