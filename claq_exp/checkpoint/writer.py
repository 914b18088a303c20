"""Writes a packed checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from claq_exp.checkpoint.manifest import CARD, asking_for_code, check_manifest, write_manifest
from claq_exp.errors import CheckpointError
from claq_exp.models.ends import in_blocks, is_end
from claq_exp.models.skeleton import tied_names
from claq_exp.models.towers import runs_own_code
from claq_exp.payload.base import Layout
from claq_exp.payload.stored import STORED_DTYPES, Ledger
from claq_exp.quantize.activation.rounding import Rounding
from claq_exp.sources.cache import published
from claq_exp.sources.companions import GENERATION, Companions
from claq_exp.sources.weight_files import NAMED
from claq_exp.system.files import read_json, sync_folder, write_bytes, write_json
from claq_exp.tensor_files.shards import (
    INDEX_FILE,
    SHARD_BYTES,
    Unit,
    described_bytes,
    read_spans,
    save_units,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMAT_VERSION = 4  # docs/format.md says when it grows
QUANT_METHOD = "claq"


@dataclass(frozen=True)
class PackedWeight:
    """A quantized matrix as it is stored: its layout and its tensors by suffix."""

    layout: Layout
    tensors: Mapping[str, Tensor]

    def unit(self, name: str) -> Unit:
        """Return what is written of the matrix; its tensors are asked for when it is written."""
        like = {
            f"{name}.{suffix}": torch.empty(
                stored.shape, dtype=STORED_DTYPES[stored.dtype], device="meta"
            )
            for suffix, stored in self.layout.stored_tensors().items()
        }
        return Unit(like, None, lambda: {f"{name}.{s}": self.tensors[s] for s in self.tensors})


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint takes on disk.

    bytes: weights, their index and config.json (tokenizer files are the original's, the manifest
    only checks).  ledger: the same in bits by purpose.
    nominal, linear, model: bits per weight as defined in the README; nominal and linear ones count
    the layers of blocks, and no packed embedding or head.
    """

    bytes: int
    ledger: Ledger
    nominal: float
    linear: float
    model: float


def write_checkpoint(  # noqa: PLR0913 - every one has a default, but what is written
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Mapping[str, PackedWeight],
    dtype: torch.dtype,
    *,
    source: Path | None = None,
    read: Callable[[str], Tensor] | None = None,
    rounding: Rounding | None = None,
    card: Callable[[Path], str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint (docs/format.md) and publish it by rename.

    packed: name of the linear layer, embedding or head -> its packed weight.  dtype: of the tensors
    that stay unquantized.
    source: folder of the original, whose tokenizer files, settings of processors and of generation,
    chat templates and licence come along byte by byte (`Companions`); what it lacks, the tokenizer
    and the model write.
    read: returns a parameter of the model by name, for those on the meta device.
    rounding: of the inputs of the packed layers.
    card: returns the model card, from the folder as it will be published.
    shard_bytes: of tensors in one file; those of one matrix stay together.
    Raises CheckpointError when `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it to write it anew")
    with published(target) as folder:
        save_units(folder, _units(model, packed, dtype, read), shard_bytes)
        layouts = {name: weight.layout for name, weight in packed.items()}
        config = checkpoint_config(model, layouts, dtype, rounding)
        config.save_pretrained(folder)
        _write_companions(folder, model, tokenizer, source)
        write_manifest(folder)
        if card is not None:
            write_card(folder, card(folder))
        sync_folder(folder)
    check_manifest(target)
    sync_folder(target.parent)


def write_card(folder: Path, text: str) -> None:
    """Write the model card of a checkpoint, or replace it: nothing else of it depends on that."""
    write_bytes(folder / CARD, text.encode())


def checkpoint_config(
    model: PreTrainedModel,
    layouts: Mapping[str, Layout],
    dtype: torch.dtype,
    rounding: Rounding | None = None,
) -> PretrainedConfig:
    """Return the config of a checkpoint, which says how each matrix is stored."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if getattr(config, NAMED, None) is not None:  # the original's file of weights
        delattr(config, NAMED)
    config.quantization_config = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "modules": {name: layout.to_json() for name, layout in layouts.items()},
    }
    if rounding is not None:
        config.quantization_config["activation"] = rounding.to_json()
    return config


def planned_sizes(
    model: PreTrainedModel,
    layouts: Mapping[str, Layout],
    dtype: torch.dtype,
    rounding: Rounding | None = None,
) -> Sizes:
    """Return what a checkpoint with these layouts will take; `model` may be on the meta device."""
    packed = {name: PackedWeight(layout, {}) for name, layout in layouts.items()}
    kept = kept_bytes(model, packed, dtype)
    config = checkpoint_config(model, layouts, dtype, rounding).to_json_string().encode()
    described = len(config) + described_bytes(_units(model, packed, dtype, None), SHARD_BYTES)
    ledger = Ledger.sum([_quantized(layouts), Ledger(other=8 * described, unquantized=8 * kept)])
    state = model.state_dict()
    parameters = sum(t.numel() for n, t in state.items() if n not in tied_names(model))
    return _sizes(ledger, layouts, parameters)


def _units(
    model: PreTrainedModel,
    packed: Mapping[str, PackedWeight],
    dtype: torch.dtype,
    read: Callable[[str], Tensor] | None,
) -> Iterator[Unit]:
    for name, weight in packed.items():
        yield weight.unit(name)
    for name, tensor in unquantized_state(model, packed).items():
        if tensor.is_meta and read is not None:
            yield Unit({name: tensor}, dtype, partial(_read_one, read, name))
        else:
            yield Unit({name: tensor}, dtype)


def _read_one(read: Callable[[str], Tensor], name: str) -> dict[str, Tensor]:
    return {name: read(name)}


def _write_companions(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Path | None,
) -> None:
    """Write what belongs to a model beside config and weights: the source's, where it has it."""
    vocabulary = tuple(getattr(tokenizer, "vocab_files_names", {}).values())
    companions = None if source is None else Companions(source, vocabulary)
    files = [] if companions is None else [*companions.tokenizer(), *companions.others()]
    if companions is None or not companions.tokenizer():
        tokenizer.save_pretrained(folder)
    if model.generation_config is not None and Path(GENERATION) not in files:
        model.generation_config.save_pretrained(folder)
    if companions is not None:
        companions.copy(files, folder)
    own_code = {"config.json": model.config, "tokenizer_config.json": tokenizer}
    remote = [name for name, owner in own_code.items() if runs_own_code(owner)]
    for name in asking_for_code(folder):
        if not remote or (name in own_code and name not in remote):
            _forget_code(folder / name)
    if companions is not None and asking_for_code(folder):
        companions.copy(companions.code(), folder)


def _forget_code(path: Path) -> None:
    """Drop `auto_map`, which asks for code, where no such code was in use."""
    data = read_json(path)
    del data["auto_map"]
    write_json(path, data)


def unquantized_state(model: PreTrainedModel, packed: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint keeps as they are; tied ones once."""
    left_out = {f"{name}.weight" for name in packed} | set(tied_names(model))
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def kept_bytes(model: PreTrainedModel, packed: Collection[str], dtype: torch.dtype) -> int:
    """Return the bytes of what a checkpoint keeps as it is.  packed: names of the others."""
    return sum(
        tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in unquantized_state(model, packed).values()
    )


def bits_beside_layers(
    model: PreTrainedModel, layers: Collection[str], ends: Mapping[str, Layout], dtype: torch.dtype
) -> float:
    """Return the bits of a checkpoint's tensors that are not of packed layers of blocks.

    layers: their names.  ends: name -> layout of a packed embedding and head.  dtype: of the rest.
    """
    kept = kept_bytes(model, {*layers, *ends}, dtype)
    return 8.0 * kept + sum(layout.ledger().total for layout in ends.values())


def checkpoint_sizes(folder: Path, layouts: Mapping[str, Layout], parameters: int) -> Sizes:
    """Count a checkpoint from its files.

    parameters: of the original model, tied ones once.  `other` in the ledger is config.json, where
    the layouts stand, the index, and the headers of the weights files.
    """
    quantized = _quantized(layouts)
    shards = read_spans(folder)
    described = [folder / name for name in ("config.json", INDEX_FILE)]
    beside = sum(path.stat().st_size for path in described if path.is_file())
    total = beside + sum((folder / name).stat().st_size for name in shards)
    tensors = sum(span.end - span.start for spans in shards.values() for span in spans.values())
    ledger = Ledger.sum(
        [quantized, Ledger(other=8 * (total - tensors), unquantized=8 * tensors - quantized.total)]
    )
    return _sizes(ledger, layouts, parameters)


def _quantized(layouts: Mapping[str, Layout]) -> Ledger:
    """Return the bits of all packed matrices, those of embedding and head in their own account."""
    return Ledger.sum(
        Ledger(embedding=layout.ledger().total) if is_end(name) else layout.ledger()
        for name, layout in layouts.items()
    )


def _sizes(ledger: Ledger, layouts: Mapping[str, Layout], parameters: int) -> Sizes:
    linears = in_blocks(layouts).values()
    weights = sum(layout.weights for layout in linears)
    nominal = sum(layout.nominal_bits() * layout.weights for layout in linears)
    return Sizes(
        bytes=ledger.total // 8,
        ledger=ledger,
        nominal=nominal / weights,
        linear=(ledger.total - ledger.unquantized - ledger.embedding) / weights,
        model=ledger.total / parameters,
    )
