"""The stored form of one quantized matrix: which tensors, of which shape, on which account."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from claq_exp.errors import CheckpointError, ConfigError
from claq_exp.quantize.number_formats.formats import LEARNED, BlockFormat

COLUMN_CODEBOOKS = "column_codebooks"
ROW_GRID = "row_grid"
BLOCK_FORMAT = "block_format"
KINDS = (COLUMN_CODEBOOKS, ROW_GRID, BLOCK_FORMAT)
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "U8": torch.uint8}
MAX_BITS = 8
HALF = 16  # bits of a float16
HALF_MAX = 65504.0  # the largest float16


@dataclass(frozen=True)
class Ledger:
    """Bits by purpose; the accounts add up to everything that is stored."""

    codes: int = 0
    codebooks: int = 0
    column_bits: int = 0
    reserved_values: int = 0
    reserved_positions: int = 0
    scales: int = 0
    other: int = 0
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
    """One tensor of the stored form, and the account that pays for it.  dtype: of STORED_DTYPES."""

    dtype: str
    shape: tuple[int, ...]
    account: str

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


@dataclass(frozen=True)
class Form:
    """What a codebook decides of a stored form: the fields of WeightLayout of these names."""

    kind: str = COLUMN_CODEBOOKS
    group_size: int = 0
    shared_codebooks: bool = False
    row_scaled: bool = False
    block_format: BlockFormat | None = None


@dataclass(frozen=True)
class WeightLayout:
    """Everything about a stored matrix but its numbers; kept as JSON beside the tensors.

    columns_per_width: code width in bits -> how many columns have it.
    group_size: columns that share one row grid (`row_grid` only).
    shared_codebooks: one codebook per width, and a scale and shift per column.
    row_scaled: every row has a scale.
    reserved: float16 entries in the whole matrix; most_reserved: in its fullest column.
    block_format: of the kind of that name, which has no reserved entries.
    """

    kind: str
    rows: int
    columns: int
    columns_per_width: dict[int, int] = field(default_factory=dict)
    group_size: int = 0
    shared_codebooks: bool = False
    row_scaled: bool = False
    reserved: int = 0
    most_reserved: int = 0
    block_format: BlockFormat | None = None

    def __post_init__(self) -> None:
        counts = (self.rows, self.columns, self.group_size, self.reserved, self.most_reserved)
        if any(type(count) is not int or not 0 <= count < 2**48 for count in counts):
            raise CheckpointError(f"the counts of a layout must be whole numbers, not {counts}")
        if self.rows < 1 or self.most_reserved > self.rows or self.reserved > self.weights:
            raise CheckpointError(f"{self.rows} rows cannot hold {self.reserved} reserved entries")
        if self.kind not in KINDS:
            raise CheckpointError(
                f"unknown kind of quantized weight '{self.kind}'; known: {', '.join(KINDS)}"
            )
        widths_fit = all(1 <= width <= MAX_BITS for width in self.columns_per_width)
        if not widths_fit or sum(self.columns_per_width.values()) != self.columns:
            raise CheckpointError(
                f"columns per width {self.columns_per_width} do not make {self.columns} columns"
            )
        flags = (self.shared_codebooks, self.row_scaled)
        if any(type(flag) is not bool for flag in flags):
            raise CheckpointError(f"the flags of a layout must be true or false, not {flags}")
        if self.kind == ROW_GRID and (
            len(self.columns_per_width) != 1 or self.group_size < 1 or any(flags)
        ):
            raise CheckpointError(
                "a row grid has one code width, a positive group size and no codebooks"
            )
        if (self.kind == BLOCK_FORMAT) != (self.block_format is not None):
            raise CheckpointError(f"the layout of a {self.kind} and its block_format do not fit")
        if self.block_format is not None:
            self._check_block_format(self.block_format)

    def _check_block_format(self, block_format: BlockFormat) -> None:
        if (
            list(self.columns_per_width) != [block_format.bits]
            or self.shared_codebooks
            or self.row_scaled
            or self.reserved
        ):
            raise CheckpointError(
                "a block format has codes of its own width, and neither row scales nor reserved "
                "entries"
            )
        if not block_format.array or block_format.rule.bits != 8:
            raise CheckpointError("a weight in a block format has scales of 8 bits for its arrays")

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def groups(self) -> int:
        """Row grids along the input dimension."""
        return -(-self.columns // self.group_size)

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return suffix -> tensor for everything that is stored of this matrix."""
        tensors: dict[str, StoredTensor] = {}
        for width, columns in sorted(self.columns_per_width.items()):
            shape = (columns, packed_bytes(self.rows, width))
            tensors[f"codes_{width}"] = StoredTensor("U8", shape, "codes")
            if self.kind == COLUMN_CODEBOOKS:
                entries = (2**width,) if self.shared_codebooks else (columns, 2**width)
                tensors[f"codebooks_{width}"] = StoredTensor("F16", entries, "codebooks")
            elif self.kind == ROW_GRID:
                zeros = packed_bytes(self.rows * self.groups, width)
                tensors["scales"] = StoredTensor("F16", (self.rows, self.groups), "scales")
                tensors["zeros"] = StoredTensor("U8", (zeros,), "scales")
        if self.block_format is not None:
            tensors |= self._block_tensors(self.block_format)
        if self.shared_codebooks:
            tensors["column_scales"] = StoredTensor("F16", (self.columns, 2), "scales")
        if self.row_scaled:
            tensors["row_scales"] = StoredTensor("F16", (self.rows,), "scales")
        if len(self.columns_per_width) > 1:
            width = index_width(len(self.columns_per_width))
            tensors["column_bits"] = StoredTensor(
                "U8", (packed_bytes(self.columns, width),), "column_bits"
            )
        if self.reserved:
            rows = packed_bytes(self.reserved, index_width(self.rows))
            counts = packed_bytes(self.columns, self.most_reserved.bit_length())
            tensors["reserved_values"] = StoredTensor("F16", (self.reserved,), "reserved_values")
            tensors["reserved_rows"] = StoredTensor("U8", (rows,), "reserved_positions")
            tensors["reserved_counts"] = StoredTensor("U8", (counts,), "reserved_positions")
        return tensors

    def _block_tensors(self, block_format: BlockFormat) -> dict[str, StoredTensor]:
        arrays, blocks = block_format.arrays(self.columns), block_format.blocks(self.columns)
        tensors = {"block_scales": StoredTensor("U8", (self.rows, arrays), "scales")}
        if block_format.rule.outer:
            limits = self.rows if block_format.rule.by_row else 1
            tensors["block_limits"] = StoredTensor("F32", (limits,), "scales")
        if blocks:
            selectors = self.rows, packed_bytes(blocks, block_format.selector_bits)
            tensors["block_selectors"] = StoredTensor("U8", selectors, "codebooks")
        if block_format.codewords == LEARNED:
            codewords = block_format.codebooks * 2**block_format.bits
            stored = packed_bytes(codewords, block_format.codeword_bits)
            tensors["block_codebooks"] = StoredTensor("U8", (stored,), "codebooks")
        return tensors

    def ledger(self) -> Ledger:
        """Return the bits that the stored tensors take, padding included."""
        accounts: dict[str, int] = {}
        for tensor in self.stored_tensors().values():
            accounts[tensor.account] = accounts.get(tensor.account, 0) + tensor.bits
        return Ledger(**accounts)

    def nominal_bits(self) -> float:
        """Return the bits per weight that papers print.

        Codes, and 16 bits in place of a code for each reserved entry, as in CLAQ's own r * (16 - b)
        accounting; codebooks, positions, column maps and padding are left out.
        """
        mean = (
            sum(width * columns for width, columns in self.columns_per_width.items()) / self.columns
        )
        return mean + self.reserved / self.weights * (HALF - mean)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; JSON keys are strings."""
        data = asdict(self)
        data["columns_per_width"] = {
            str(width): columns for width, columns in self.columns_per_width.items()
        }
        if self.block_format is None:
            del data["block_format"]
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> WeightLayout:
        """Read `to_json` back.  Raises CheckpointError on anything else."""
        try:
            widths = {
                int(width): int(columns) for width, columns in data["columns_per_width"].items()
            }
            blocks = data.get("block_format")
            block_format = None if blocks is None else BlockFormat(**blocks)
            return WeightLayout(
                **{**data, "columns_per_width": widths, "block_format": block_format}
            )
        except (TypeError, ValueError, KeyError, AttributeError, ConfigError) as error:
            raise CheckpointError(
                f"layout of a quantized weight is not readable: {error}"
            ) from error
