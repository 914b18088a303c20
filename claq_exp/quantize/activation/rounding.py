"""The rounding of a model's activations: all that a checkpoint says of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.number_formats.encoding import round_values
from claq_exp.number_formats.formats import LEARNED, BlockFormat
from claq_exp.number_formats.lo_bcq import design_codebooks, normalized_blocks
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.number_formats.universal import LOCAL, read_codebooks
from claq_exp.quantize.activation import SCOPES, STATIC, TOKEN, Activation

KEYS = {"format", "scope", "codebooks", "maxima"}


@dataclass(frozen=True)
class Observed:
    """What was seen of the inputs of linear layers.

    maxima: linear -> largest magnitude.  samples: some inputs [tokens, in] of each.
    """

    maxima: Mapping[str, float]
    samples: tuple[Tensor, ...]


@dataclass(frozen=True)
class Rounding:
    """A block format for activations, with its codewords.

    scope: what shares the outer scale: token, tensor or static.
    maxima: linear -> the maximum that its outer scale follows from (static).
    """

    grid: FormatCodebooks
    scope: str = TOKEN
    maxima: Mapping[str, float] = field(default_factory=dict)

    def limit(self, linear: str) -> float | None:
        """Return the maximum that a layer's outer scale follows from; None to find it in inputs."""
        return self.maxima[linear] if self.scope == STATIC else None

    def round(self, values: Tensor, limit: float | None = None) -> Tensor:
        """Round inputs of a layer: [..., in], of any floating dtype."""
        return round_values(values, self.grid, by_row=self.scope == TOKEN, limit=limit)

    def bits(self, widths: Iterable[int]) -> float:
        """Return the bits of an input number on average.  widths: `in` of all layers."""
        whole = list(widths)
        per_token = self.scope == TOKEN  # else the outer scale serves many tokens
        total = sum(
            width * self.grid.format.bits_per_number(width if per_token else None)
            for width in whole
        )
        return total / sum(whole)

    def describe(self) -> str:
        """Return this in a few words."""
        outer = f", a scale above for each {self.scope}" if self.grid.format.rule.outer else ""
        if self.scope == STATIC and outer:
            outer = ", scales above of the calibration text"
        return f"{self.grid.format.bits} bits: {self.grid.format.describe()}{outer}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        learned = self.grid.format.codewords == LEARNED
        return {
            "format": self.grid.format.to_json(),
            "scope": self.scope,
            "codebooks": self.grid.codebooks.int().tolist() if learned else None,
            "maxima": dict(self.maxima),
        }

    @staticmethod
    def from_json(data: Any, linears: Iterable[str]) -> Rounding:
        """Read `to_json` back.  linears: that are rounded.

        Raises CheckpointError on anything else.
        """
        if not isinstance(data, dict) or set(data) != KEYS:
            raise CheckpointError(f"activation must have the keys {sorted(KEYS)}")
        try:
            block_format = BlockFormat(**data["format"])
            grid = _grid(block_format, data["codebooks"])
        except (TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"activation is not readable: {error}") from error
        scope, maxima = data["scope"], data["maxima"]
        asked = set(linears) if scope == STATIC else set[str]()
        if scope not in SCOPES or not isinstance(maxima, dict) or set(maxima) != asked:
            raise CheckpointError(f"activation has the scope '{scope}' and other maxima than it")
        if any(type(m) is not float or not 0 <= m < math.inf for m in maxima.values()):
            raise CheckpointError("activation has a maximum that is none")
        return Rounding(grid, scope, maxima)


def _grid(block_format: BlockFormat, codebooks: Any) -> FormatCodebooks:
    if block_format.codewords != LEARNED:
        if codebooks is not None:
            raise ValueError("codebooks for a format that has none of its own")
        return FormatCodebooks.fixed(block_format)
    books = torch.tensor(codebooks, dtype=torch.float32)
    if books.shape != (block_format.codebooks, 2**block_format.bits):
        raise ValueError(f"codebooks of the shape {tuple(books.shape)}")
    fits = bool((books.abs() <= block_format.top).all()) and bool((books == books.round()).all())
    if not fits or bool((books.diff(dim=1) < 0).any()):
        raise ValueError("codebooks must be ascending whole numbers of codeword_bits")
    return FormatCodebooks(block_format, books)


def needs_text(activation: Activation) -> bool:
    """Tell whether a rule is settled by what is seen of a text."""
    return activation.books == LOCAL or activation.scope == STATIC


def settle_rounding(activation: Activation, observed: Observed | None) -> Rounding | None:
    """Settle a rule; None where inputs are left alone.

    observed: what was seen of the inputs of the layers that are quantized, where it needs a text.
    Raises ConfigError where there are no codebooks for the format.
    """
    block_format = activation.block_format()
    if block_format is None:
        return None
    scope, books = activation.scope, activation.books
    if block_format.codewords != LEARNED:
        grid = FormatCodebooks.fixed(block_format)
    elif books == LOCAL and observed is not None:
        parts = [normalized_blocks(sample, block_format) for sample in observed.samples]
        design = design_codebooks(torch.cat(parts), block_format.bits, block_format.codebooks)
        grid = FormatCodebooks(block_format, design.rounded(block_format.codeword_bits))
    else:
        grid = FormatCodebooks(block_format, read_codebooks(books, block_format))
    maxima = observed.maxima if observed is not None and scope == STATIC else {}
    return Rounding(grid, scope, maxima)


def expected_rounding(activation: Activation, linears: Iterable[str]) -> Rounding | None:
    """Return a rounding that takes as much room as the one that a text will settle."""
    block_format = activation.block_format()
    if block_format is None or not needs_text(activation):
        return settle_rounding(activation, None)
    books = torch.zeros(block_format.codebooks, 2**block_format.bits)
    scope = activation.scope
    maxima = dict.fromkeys(linears, 10.123456789012345) if scope == STATIC else {}
    return Rounding(FormatCodebooks(block_format, books - 10.0), scope, maxima)
