"""Weights in block formats: a scale for each array of a row, a codebook for each block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.number_formats.encoding import encode
from claq_exp.number_formats.formats import E2M1, INTEGER, LEARNED, BlockFormat
from claq_exp.number_formats.levels import BlockLevels
from claq_exp.number_formats.lo_bcq import design_codebooks, normalized_blocks
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.number_formats.universal import LOCAL, read_codebooks
from claq_exp.payload.block_format import BlockCodes, BlockFormatLayout
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.base import Codebook
from claq_exp.quantize.codebook.columns import FixedColumns
from claq_exp.quantize.codebook.compiled import FormatTask, code_in_format
from claq_exp.quantize.statistics import ColumnStatistics

LOCAL_NUMBERS = 1 << 17  # of a matrix that its own codebooks are designed on
LOCAL_ROUNDS = 20


@dataclass(frozen=True)
class BlockCodebook(Codebook, ABC):
    """The base of block formats: scales and selectors are fixed before compensation.

    Static as those of `uniform`, they cost no column index under act-order.
    """

    mixed_widths: ClassVar[bool] = False
    reserves: ClassVar[bool] = False
    holds_levels: ClassVar[bool] = True
    bits: ClassVar[int | None] = None  # of a code, where the format has just one width

    @abstractmethod
    def block_format(self, bits: int) -> BlockFormat:
        """Return the format with codes of so many bits."""

    def check(self, bits: int) -> None:
        """Raise ConfigError where there are no codes of so many bits."""
        if self.bits not in (None, bits):
            raise ConfigError(
                f"this codebook has codes of {self.bits} bits; use precision=fixed "
                f"precision.bits={self.bits}"
            )
        self.block_format(bits)

    def grid(self, weight: Tensor, bits: int) -> FormatCodebooks:
        """Return the format with its codewords, for a weight [out, in] float32."""
        return FormatCodebooks.fixed(self.block_format(bits))

    def layout(self, rows: int, plan: ColumnPlan) -> BlockFormatLayout:
        """Return how a matrix of so many rows is stored with a plan."""
        bits, columns = int(plan.column_bits[0]), len(plan.column_bits)
        return BlockFormatLayout(rows=rows, columns=columns, block_format=self.block_format(bits))

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> BlockColumns:
        """Begin a matrix; all columns have one width."""
        weight = statistics.weight
        return BlockColumns(weight, plan, self.grid(weight, int(plan.column_bits[0])))


@dataclass(frozen=True)
class MxFp4(BlockCodebook):
    """E2M1 codewords and a power of two for each array (OCP Microscaling formats 1.0: MXFP4)."""

    bits: ClassVar[int | None] = 4

    array: int = 32

    def block_format(self, bits: int) -> BlockFormat:
        """Return the format."""
        return BlockFormat(bits, self.array, "e8m0", E2M1)


@dataclass(frozen=True)
class NvFp4(BlockCodebook):
    """E2M1 codewords, an E4M3 scale for each array and a float32 scale for the matrix (NVFP4)."""

    bits: ClassVar[int | None] = 4

    array: int = 16

    def block_format(self, bits: int) -> BlockFormat:
        """Return the format."""
        return BlockFormat(bits, self.array, "e4m3", E2M1)


@dataclass(frozen=True)
class Vsq(BlockCodebook):
    """Integers, an 8-bit integer scale for each array and a float32 scale for each row.

    Source: VS-Quant (arXiv 2102.04503).
    """

    array: int = 16

    def block_format(self, bits: int) -> BlockFormat:
        """Return the format."""
        return BlockFormat(bits, self.array, "integer", INTEGER)


@dataclass(frozen=True)
class Bfp(BlockCodebook):
    """Integers and a power of two for each array: block floating point."""

    array: int = 16

    def block_format(self, bits: int) -> BlockFormat:
        """Return the format."""
        return BlockFormat(bits, self.array, "e8m0", INTEGER)


@dataclass(frozen=True)
class LoBcq(BlockCodebook):
    """A codebook for each block, out of a few that suit blocks best; an E4M3 scale for each array.

    Source: LO-BCQ (arXiv 2502.05376), reconstructed; docs/bcq.md.

    block, array: numbers that share a codebook, and a scale.
    codebooks: how many.  codeword_bits: of their entries, signed integers.
    scale: e4m3, what codewords are multiplied by; or e4m3_inverse, what numbers are.
    books: universal, those of the package; local, designed on each matrix; or the path of a file.
    """

    array: int = 64
    block: int = 8
    codebooks: int = 8
    codeword_bits: int = 6
    scale: str = "e4m3"
    books: str = "universal"

    def __post_init__(self) -> None:
        if self.scale not in ("e4m3", "e4m3_inverse"):
            raise ConfigError(f"scale is '{self.scale}'; choose one of: e4m3, e4m3_inverse")
        self.block_format(2)

    def block_format(self, bits: int) -> BlockFormat:
        """Return the format."""
        sizes = self.block, self.codebooks, self.codeword_bits
        return BlockFormat(bits, self.array, self.scale, LEARNED, *sizes)

    def check(self, bits: int) -> None:
        """Raise ConfigError where there are no codebooks for codes of so many bits."""
        block_format = self.block_format(bits)
        if self.books != LOCAL:
            read_codebooks(self.books, block_format)

    def grid(self, weight: Tensor, bits: int) -> FormatCodebooks:
        """Return the format with its codebooks."""
        block_format = self.block_format(bits)
        if self.books != LOCAL:
            return FormatCodebooks(block_format, read_codebooks(self.books, block_format))
        return FormatCodebooks(block_format, local_codebooks(weight, block_format))


def local_codebooks(weight: Tensor, block_format: BlockFormat) -> Tensor:
    """Design codebooks on rows that are spread over a matrix: [codebooks, 2**bits] float32."""
    rows, columns = weight.shape
    some = torch.linspace(0, rows - 1, max(1, min(rows, LOCAL_NUMBERS // columns)))
    blocks = normalized_blocks(weight[some.round().long()], block_format)
    if len(blocks) < block_format.codebooks:  # a matrix of zeros, or a tiny one
        filler = torch.linspace(-1, 1, block_format.codebooks * block_format.block)
        blocks = torch.cat([blocks, filler.reshape(-1, block_format.block)])
    design = design_codebooks(
        blocks, block_format.bits, block_format.codebooks, rounds=LOCAL_ROUNDS
    )
    return design.rounded(block_format.codeword_bits)


class BlockColumns(FixedColumns):
    """The codes found so far in a block format."""

    def __init__(self, weight: Tensor, plan: ColumnPlan, grid: FormatCodebooks) -> None:
        rows, columns = weight.shape
        super().__init__(rows, plan)
        encoded = encode(weight, grid, by_row=grid.format.rule.by_row)
        self._levels = BlockLevels.of(encoded, grid)
        selectors = encoded.selectors
        if selectors is None:
            selectors = torch.zeros(rows, 1, dtype=torch.uint8)
        table = grid.table
        self._task = FormatTask(
            codes=self._codes,
            table=table.codes.numpy(),
            words=table.codewords.numpy(),
            resolution=np.float32(table.resolution),
            offset=table.offset,
            steps=np.ascontiguousarray(self._levels.steps.numpy().T),
            array=min(grid.format.array, columns),
            selectors=np.ascontiguousarray(selectors.numpy().T),
            block=grid.format.block if grid.format.codebooks > 1 else columns,
        )

    def compiled(self) -> FormatTask:
        """Return the task of the compiled step."""
        return self._task

    def code_column(self, column: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Code a column, see ColumnQuantizer."""
        quantized = np.empty_like(values)
        code_in_format(values, column, self._task, quantized)
        return quantized

    def payload(self) -> BlockCodes:
        """Return codes, scales and codebooks."""
        return BlockCodes(*self.coded(), self._levels)
