"""Whether, and to what, the inputs of quantized layers are rounded while the model runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from claq_exp.errors import ConfigError, one_of
from claq_exp.number_formats.formats import E2M1, INTEGER, LEARNED, BlockFormat
from claq_exp.number_formats.universal import LOCAL, UNIVERSAL, read_codebooks

TOKEN, TENSOR, STATIC = "token", "tensor", "static"
SCOPES = (TOKEN, TENSOR, STATIC)


class Activation(Protocol):
    """A rule for the inputs of linear layers."""

    @property
    def scope(self) -> str:
        """What shares the outer scale.

        token: each token has its own; tensor: all tokens that are multiplied together; static: all
        of them, the scale is that of the calibration text.
        """
        return TOKEN

    @property
    def books(self) -> str:
        """Where codewords come from that are learned, see `codebook.block_formats.LoBcq`."""
        return ""

    def block_format(self) -> BlockFormat | None:
        """Return the format that inputs are rounded to; None to leave them alone."""


@dataclass(frozen=True)
class NoActivation(Activation):
    """Leave the inputs as they are."""

    def block_format(self) -> None:
        """Return none."""
        return


@dataclass(frozen=True)
class _Scoped(Activation, ABC):
    """The base of rules with a format: both are checked when one is made."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(one_of("activation.scope", self.scope, SCOPES))
        self.block_format()

    @abstractmethod
    def block_format(self) -> BlockFormat:
        """Return the format."""


@dataclass(frozen=True)
class Int(_Scoped):
    """Integers from -top to top, top = 2**(bits - 1) - 1.

    group_size: neighbouring inputs that share a float16 scale; 0 for one scale for each `scope`.
    """

    bits: int = 8
    group_size: int = 0
    scope: str = TOKEN

    def block_format(self) -> BlockFormat:
        """Return the format."""
        scale = "float16" if self.group_size else "outer"
        return BlockFormat(self.bits, self.group_size, scale, INTEGER)


@dataclass(frozen=True)
class Bfp(_Scoped):
    """Integers and a power of two for each array: block floating point."""

    bits: int = 4
    array: int = 16

    def block_format(self) -> BlockFormat:
        """Return the format."""
        return BlockFormat(self.bits, self.array, "e8m0", INTEGER)


@dataclass(frozen=True)
class MxFp4(_Scoped):
    """E2M1 codewords and a power of two for each array (OCP Microscaling formats 1.0: MXFP4)."""

    array: int = 32

    def block_format(self) -> BlockFormat:
        """Return the format."""
        return BlockFormat(4, self.array, "e8m0", E2M1)


@dataclass(frozen=True)
class NvFp4(_Scoped):
    """E2M1 codewords, an E4M3 scale for each array and a float32 scale for each scope (NVFP4)."""

    array: int = 16
    scope: str = TOKEN

    def block_format(self) -> BlockFormat:
        """Return the format."""
        return BlockFormat(4, self.array, "e4m3", E2M1)


@dataclass(frozen=True)
class Vsq(_Scoped):
    """Integers, an 8-bit integer scale for each array and a float32 scale for each scope.

    Source: VS-Quant (arXiv 2102.04503).
    """

    bits: int = 4
    array: int = 16
    scope: str = TOKEN

    def block_format(self) -> BlockFormat:
        """Return the format."""
        return BlockFormat(self.bits, self.array, "integer", INTEGER)


@dataclass(frozen=True)
class LoBcq(_Scoped):
    """A codebook for each block, out of a few that suit blocks best; an E4M3 scale for each array.

    Source: LO-BCQ (arXiv 2502.05376), reconstructed; docs/bcq.md.  Fields as those of the codebook
    of this name, and `scope`; `books: local` are designed once, on the calibration text.
    """

    bits: int = 4
    array: int = 64
    block: int = 8
    codebooks: int = 8
    codeword_bits: int = 6
    scale: str = "e4m3"
    books: str = UNIVERSAL
    scope: str = TOKEN

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.books != LOCAL:
            read_codebooks(self.books, self.block_format())

    def block_format(self) -> BlockFormat:
        """Return the format."""
        if self.scale not in ("e4m3", "e4m3_inverse"):
            raise ConfigError(one_of("activation.scale", self.scale, ("e4m3", "e4m3_inverse")))
        sizes = self.block, self.codebooks, self.codeword_bits
        return BlockFormat(self.bits, self.array, self.scale, LEARNED, *sizes)


ACTIVATION: dict[str, type] = {
    "bfp": Bfp,
    "int": Int,
    "lo_bcq": LoBcq,
    "mxfp4": MxFp4,
    "none": NoActivation,
    "nvfp4": NvFp4,
    "vsq": Vsq,
}
