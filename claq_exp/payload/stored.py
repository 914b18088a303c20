"""The tensors that a checkpoint stores, and the bits that they take, account by account."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "U8": torch.uint8}
MAX_BITS = 8  # of a code
HALF = 16  # bits of a float16
HALF_MAX = 65504.0  # the largest float16


@dataclass(frozen=True)
class Ledger:
    """Bits by purpose; the accounts add up to everything that is stored.

    codes to scales: of packed layers of blocks.  embedding: of a packed embedding and head, all in
    one.  unquantized: of tensors that stay as they are.  other: headers, index, config.json.
    """

    codes: int = 0
    codebooks: int = 0
    column_bits: int = 0
    reserved_values: int = 0
    reserved_positions: int = 0
    scales: int = 0
    other: int = 0
    embedding: int = 0
    unquantized: int = 0

    @property
    def total(self) -> int:
        """All bits."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Return account -> bits."""
        return asdict(self)

    @staticmethod
    def sum(ledgers: Iterable[Ledger]) -> Ledger:
        """Add ledgers account by account."""
        totals = {account.name: 0 for account in fields(Ledger)}
        for ledger in ledgers:
            for account, bits in ledger.as_dict().items():
                totals[account] += bits
        return Ledger(**totals)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the stored form, and the account that pays for it.

    dtype: of STORED_DTYPES.  packed: (integers in a row, their width) where it holds packed
    integers (`claq_exp.payload.packing`); None where it holds numbers as they are.
    """

    dtype: str
    shape: tuple[int, ...]
    account: str
    packed: tuple[int, int] | None = None

    @staticmethod
    def of_integers(lines: tuple[int, ...], count: int, width: int, account: str) -> StoredTensor:
        """Return a tensor of packed integers: `count` of `width` bits in every line."""
        return StoredTensor("U8", (*lines, packed_bytes(count, width)), account, (count, width))

    @property
    def bits(self) -> int:
        """Size in bits."""
        size = 8 * STORED_DTYPES[self.dtype].itemsize
        for length in self.shape:
            size *= length
        return size


def packed_bytes(count: int, width: int) -> int:
    """Return the bytes of `count` integers of `width` bits, padded to a whole byte."""
    return (count * width + 7) // 8


def index_width(count: int) -> int:
    """Return the bits that tell `count` alternatives apart (0 for one)."""
    return (count - 1).bit_length()
