"""Writes a packed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from claq_exp.checkpoint.files import check_manifest, save_tensors, sync_folder, write_manifest
from claq_exp.errors import CheckpointError
from claq_exp.models.skeleton import tied_names
from claq_exp.quantize.layout import Ledger, WeightLayout
from claq_exp.sources.cache import published

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT_VERSION = 1
QUANT_METHOD = "claq"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class PackedWeight:
    """A quantized matrix as it is stored: its layout and its tensors by suffix."""

    layout: WeightLayout
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint takes on disk.

    bytes: weights and config.json (tokenizer files are the original's).  ledger: the same in bits
    by purpose.
    nominal, linear, model: bits per weight as defined in the README.
    """

    bytes: int
    ledger: Ledger
    nominal: float
    linear: float
    model: float


def write_checkpoint(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Mapping[str, PackedWeight],
    dtype: torch.dtype,
) -> None:
    """Write a checkpoint and publish it by rename.

    packed: name of the linear layer -> its packed weight.  dtype: of the tensors that stay
    unquantized. Raises CheckpointError when `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it to write it anew")
    with published(target) as folder:
        tensors = {
            f"{name}.{suffix}": tensor.contiguous()
            for name, weight in packed.items()
            for suffix, tensor in weight.tensors.items()
        }
        for name, tensor in unquantized_state(model, packed).items():
            stored = tensor.detach().to(
                "cpu", dtype if tensor.is_floating_point() else tensor.dtype
            )
            tensors[name] = stored.contiguous()
        save_tensors(tensors, folder / WEIGHTS_FILE)
        config = type(model.config).from_dict(model.config.to_dict())
        config.dtype = dtype
        config.quantization_config = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "modules": {name: weight.layout.to_json() for name, weight in packed.items()},
        }
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        write_manifest(folder)
        sync_folder(folder)
    check_manifest(target)
    sync_folder(target.parent)


def unquantized_state(
    model: PreTrainedModel, packed: Mapping[str, PackedWeight]
) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint keeps as they are; tied ones once."""
    left_out = {f"{name}.weight" for name in packed} | tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def checkpoint_sizes(folder: Path, layouts: Mapping[str, WeightLayout], parameters: int) -> Sizes:
    """Count a checkpoint from its files.

    parameters: of the original model, tied ones once.  `other` in the ledger is config.json and the
    header of the weights file, where the layouts stand.
    """
    quantized = Ledger.sum(layout.ledger() for layout in layouts.values())
    weights_file = folder / WEIGHTS_FILE
    with weights_file.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    described = header + (folder / "config.json").stat().st_size
    total = weights_file.stat().st_size + (folder / "config.json").stat().st_size
    kept = 8 * (total - described) - quantized.total
    ledger = Ledger.sum([quantized, Ledger(other=8 * described, unquantized=kept)])
    weights = sum(layout.weights for layout in layouts.values())
    nominal = sum(layout.nominal_bits() * layout.weights for layout in layouts.values())
    return Sizes(
        bytes=total,
        ledger=ledger,
        nominal=nominal / weights,
        linear=(quantized.total + ledger.other) / weights,
        model=8 * total / parameters,
    )
