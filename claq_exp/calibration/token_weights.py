"""What an error in the outputs of a linear weighs at each token, kept batch by batch on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from claq_exp.quantize.objective import Objective
from claq_exp.sources.kept import digest_of, read_tensors, write_tensors

ALL = "squares"  # the tensor of a file: all linears, one behind the other


@dataclass(frozen=True)
class TokenWeights:
    """The weights of calibration tokens for each linear of the blocks.

    folder: of one file for each batch, with what `BackwardPass.squares` found.
    batches: token ids [batch, seqlen] of all ranks.  names: full names of the linears, in order.
    objective: makes weights of the squares of all tokens.
    """

    folder: Path
    batches: list[Tensor] = field(repr=False)
    names: tuple[str, ...]
    objective: Objective

    def has(self, batch: int) -> bool:
        """Tell whether the squares of a batch are there, and are what was written."""
        found = read_tensors(self._path(batch), self._key(batch))
        return found is not None and len(found.get(ALL, ())) == self._length(batch)

    def keep(self, batch: int, squares: Tensor) -> None:
        """Keep the squares of a batch, as `flat` returns them."""
        write_tensors(self._path(batch), self._key(batch), {ALL: squares})

    def flat(self, squares: Mapping[str, Tensor]) -> Tensor:
        """Return the squares of all linears one behind the other: [numbers] float32."""
        return torch.cat([squares[name].reshape(-1) for name in self.names])

    def of(self, name: str) -> list[Tensor]:
        """Return the weights of each batch: [batch, seqlen, groups] float32, 1 on average."""
        shapes = [(*batch.shape, self.objective.groups) for batch in self.batches]
        place = self._places[name]
        parts = []
        for number, shape in enumerate(shapes):
            size = math.prod(shape)
            with safe_open(self._path(number), "pt") as file:
                stored = file.get_slice(ALL)[place * size : (place + 1) * size]
            parts.append(stored.view(-1, shape[-1]))
        weights = self.objective.weights(torch.cat(parts)).split([len(part) for part in parts])
        return [own.view(shape) for own, shape in zip(weights, shapes, strict=True)]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def _length(self, batch: int) -> int:
        return self.batches[batch].numel() * self.objective.groups * len(self.names)

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch_{batch:05d}.safetensors"

    def _key(self, batch: int) -> str:
        return f"{digest_of(self.batches[batch])} in {self.objective.groups} groups of rows"
