"""What a block format is: its codewords, its scales, and what a number costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, one_of
from claq_exp.number_formats.scales import SCALES, ScaleRule

LEARNED, INTEGER, E2M1 = "learned", "integer", "e2m1"
CODEWORDS = (LEARNED, INTEGER, E2M1)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling 1.0, section 5.3.3
OUTER_BITS = 32  # of a float32


@dataclass(frozen=True)
class BlockFormat:
    """A format for numbers along the input dimension of a matrix product.

    A number is codeword * scale: `array` neighbours share a scale, `block` neighbours the codebook
    that their codes choose a codeword of.

    bits: of a code.  array, block: numbers, one a multiple of the other; array 0 for all there are.
    scale: a name of `claq_exp.number_formats.scales.SCALES`.
    codewords: learned, signed integers of `codeword_bits` bits; integer, those of `bits` bits; or
        e2m1, 4-bit floating point.
    codebooks: how many there are to choose from (learned).
    """

    bits: int
    array: int
    scale: str
    codewords: str
    block: int = 0
    codebooks: int = 1
    codeword_bits: int = 0

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ConfigError(one_of("scale", self.scale, SCALES))
        if self.codewords not in CODEWORDS:
            raise ConfigError(one_of("codewords", self.codewords, CODEWORDS))
        numbers = (self.bits, self.array, self.block, self.codebooks, self.codeword_bits)
        if any(type(number) is not int for number in numbers):
            raise ConfigError(f"a block format counts in whole numbers, not {numbers}")
        if self.array < 0 or not 1 <= self.bits <= 8:
            raise ConfigError(
                f"a block format of {self.bits} bits and arrays of {self.array}; give 1 to 8 bits, "
                "and a positive array or 0 for a whole row"
            )
        if self.codewords == LEARNED:
            self._check_learned()
        elif (self.block, self.codebooks, self.codeword_bits) != (0, 1, 0):
            raise ConfigError(f"codewords of the kind {self.codewords} have one codebook")
        elif self.codewords == E2M1 and self.bits != 4:
            raise ConfigError(f"e2m1 codewords have 4 bits, not {self.bits}")
        elif self.codewords == INTEGER and self.bits < 2:
            raise ConfigError("integer codewords have 2 to 8 bits, not 1")

    def _check_learned(self) -> None:
        if self.block < 1 or self.array < 1 or self.array % self.block:
            raise ConfigError(
                f"array {self.array} is no multiple of block {self.block}; give one that is"
            )
        if not 1 <= self.codebooks <= 16:
            raise ConfigError(f"codebooks is {self.codebooks}; give 1 to 16")
        if not max(self.bits, 2) <= self.codeword_bits <= 8:
            raise ConfigError(
                f"codeword_bits is {self.codeword_bits}; give {max(self.bits, 2)} to 8 for codes "
                f"of {self.bits} bits"
            )

    @property
    def rule(self) -> ScaleRule:
        """How scales are stored."""
        return SCALES[self.scale]

    @property
    def top(self) -> float:
        """The codeword that the largest number of an array is scaled to."""
        if self.codewords == E2M1:
            return E2M1_VALUES[-1]
        return 2.0 ** ((self.codeword_bits or self.bits) - 1) - 1

    @property
    def unit(self) -> float:
        """What all codewords are multiples of."""
        return 0.5 if self.codewords == E2M1 else 1.0

    @property
    def selector_bits(self) -> int:
        """Bits that choose a codebook."""
        return (self.codebooks - 1).bit_length()

    def arrays(self, columns: int) -> int:
        """Return the arrays of so many numbers; the last may have fewer."""
        return -(-columns // self.array) if self.array else 1

    def blocks(self, columns: int) -> int:
        """Return the blocks of so many numbers that choose a codebook; the last may have fewer."""
        return -(-columns // self.block) if self.codebooks > 1 else 0

    def bits_per_number(self, columns: int | None = None) -> float:
        """Return the bits that are stored or moved for a number, codebooks left out.

        columns: numbers that share an outer scale; None for so many that it does not count.
        b + log2(codebooks) / block + bits of a scale / array: LO-BCQ (arXiv 2502.05376).
        """
        bits = float(self.bits)
        if self.array:
            bits += self.rule.bits / self.array
        if self.codebooks > 1:
            bits += self.selector_bits / self.block
        if columns and self.rule.outer:
            bits += OUTER_BITS / columns
        return bits

    def fixed_codebook(self) -> Tensor:
        """Return the codewords of a format that does not learn them: [1, 2**bits], ascending."""
        if self.codewords == E2M1:
            positive = torch.tensor(E2M1_VALUES)
            return torch.cat([-positive.flip(0), positive])[None]
        if self.codewords == LEARNED:
            raise ValueError("this format learns its codewords")
        half = 2 ** (self.bits - 1)
        return torch.arange(-half, half, dtype=torch.float32)[None]

    def describe(self) -> str:
        """Return this in a few words, e.g. `8 learned codebooks, arrays of 64 (e4m3)`."""
        books = f"{self.codebooks} " if self.codebooks > 1 else ""
        words = f"{books}learned codebooks" if self.codewords == LEARNED else self.codewords
        return f"{words}, arrays of {self.array or 'a row'} ({self.scale})"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)
