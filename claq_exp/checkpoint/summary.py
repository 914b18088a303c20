"""What a packed checkpoint holds, told without loading its model."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claq_exp.checkpoint.reader import (
    check_checkpoint,
    read_packed,
    read_rounding,
    unquantized_shapes,
)
from claq_exp.checkpoint.writer import Sizes, checkpoint_sizes
from claq_exp.errors import CheckpointError
from claq_exp.models.ends import is_end
from claq_exp.payload import reserved_counts
from claq_exp.payload.base import Layout
from claq_exp.quantize.activation.rounding import Rounding
from claq_exp.system.files import read_json

FULL_COLUMNS = 0.01  # share of a layer's columns that count as its fullest


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer.  in_full_columns: reserved entries in the fullest 1 % of its columns."""

    name: str
    layout: Layout
    in_full_columns: int

    @property
    def stored_bits(self) -> float:
        """Bits per weight of all its stored tensors."""
        return self.layout.ledger().total / self.layout.weights

    @property
    def reserved_share(self) -> float:
        """Share of its entries that stay in 16 bits."""
        return self.layout.reserved / self.layout.weights

    def row(self) -> dict[str, Any]:
        """Return block (0 where none is named), name, bits and reserved share, for pictures."""
        number = re.search(r"\.(\d+)\.", self.name)
        return {
            "block": int(number[1]) if number else 0,
            "name": self.name,
            "bits": self.stored_bits,
            "reserved_percent": 100 * self.reserved_share,
        }


@dataclass(frozen=True)
class Summary:
    """A checkpoint: its sizes and its quantized layers.

    parameters: of the model, tied ones once.  layers: linear ones of blocks.  rounding: of
    activations, or None.  ends: embedding and head, where they are packed.
    """

    folder: Path
    model_type: str
    parameters: int
    sizes: Sizes
    layers: tuple[LayerSummary, ...]
    rounding: Rounding | None
    ends: tuple[LayerSummary, ...] = ()

    @property
    def weights(self) -> int:
        """Number of quantized weights in linear layers of blocks."""
        return sum(layer.layout.weights for layer in self.layers)

    @property
    def reserved(self) -> int:
        """Number of entries that stay in 16 bits."""
        return sum(layer.layout.reserved for layer in self.layers)

    def column_bits(self) -> dict[int, int]:
        """Return code width -> number of columns, over all layers."""
        counts: Counter[int] = Counter()
        for layer in self.layers:
            counts.update(layer.layout.widths())
        return dict(sorted(counts.items()))


def summarize(folder: Path) -> Summary:
    """Check a checkpoint's files and tell what they hold.

    Raises ConfigError for a folder that is no checkpoint, CheckpointError for a damaged one.
    """
    layouts = check_checkpoint(folder, trust_remote_code=True)  # none is run here
    kept = unquantized_shapes(folder, layouts)
    parameters = sum(layout.weights for layout in layouts.values())
    parameters += sum(math.prod(shape) for shape in kept.values())
    layers = []
    for name, layout, tensors in read_packed(folder):
        try:
            counts = reserved_counts(layout, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {name}: {error}") from error
        full = counts.topk(math.ceil(FULL_COLUMNS * layout.columns)).values
        layers.append(LayerSummary(name, layout, int(full.sum())))
    layers.sort(key=lambda layer: _natural(layer.name))
    return Summary(
        folder=folder,
        model_type=str(read_json(folder / "config.json").get("model_type", "unknown")),
        parameters=parameters,
        sizes=checkpoint_sizes(folder, layouts, parameters),
        layers=tuple(layer for layer in layers if not is_end(layer.name)),
        rounding=read_rounding(folder),
        ends=tuple(layer for layer in layers if is_end(layer.name)),
    )


def _natural(name: str) -> list[str | int]:
    """Sort key that puts block 2 before block 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
