"""A given width for each linear layer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.payload.stored import MAX_BITS
from claq_exp.quantize.precision.base import Precision
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class LayerMap(Precision):
    """Give all columns of a layer the width that its name is mapped to.

    widths: layer -> bits; a layer is a full name (model.layers.0.mlp.down_proj), its last parts
        (down_proj, 0.mlp.down_proj) or a pattern with * ? [] for either.  The first entry that
        matches counts.
    default: bits of every other layer.

    Source: the layer-wise mix of CLAQ's reference code (its option `--mix_dict`, whose names with a
    leading dot are understood).
    """

    widths: dict[str, int] = field(default_factory=dict)
    default: int = 4

    def __post_init__(self) -> None:
        for key, bits in [("default", self.default), *self.widths.items()]:
            if not 1 <= bits <= MAX_BITS:
                where = key if key == "default" else f"widths.{key}"
                raise ConfigError(
                    f"precision.{where} is {bits}; give a whole number from 1 to {MAX_BITS}"
                )

    def check_names(self, names: Collection[str]) -> None:
        """Raise ConfigError for an entry that matches none of a model's layers."""
        for pattern in self.widths:
            if not any(_matches(pattern, name) for name in names):
                raise ConfigError(
                    f"precision.widths has '{pattern}', which is no layer of this model; there is, "
                    f"e.g., {min(names)}"
                )

    def plan_key(self, name: str) -> int:
        """Return the width of the layer of this name."""
        for pattern, bits in self.widths.items():
            if _matches(pattern, name):
                return bits
        return self.default

    def plan(self, statistics: ColumnStatistics) -> Tensor:
        """Return the width of each column: [in] uint8."""
        width = self.plan_key(statistics.name)
        return torch.full((statistics.shape[1],), width, dtype=torch.uint8)


def _matches(pattern: str, name: str) -> bool:
    part = pattern.removeprefix(".")
    return fnmatchcase(name, part) or fnmatchcase(name, f"*.{part}")
