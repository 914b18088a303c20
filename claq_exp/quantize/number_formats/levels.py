"""What the codes of a matrix in a block format stand for, and its way to stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.quantize.layout import BLOCK_FORMAT, Form, WeightLayout
from claq_exp.quantize.number_formats.encoding import Encoded, encode
from claq_exp.quantize.number_formats.formats import LEARNED, BlockFormat
from claq_exp.quantize.number_formats.table import Grid
from claq_exp.quantize.packing import pack, unpack


@dataclass(frozen=True)
class BlockLevels:
    """Scales, and the codebook of every block: blocks lie along the rows of a matrix.

    grid: the format and its codebooks.  selectors: [out, blocks] uint8; None for one codebook.
    scales: [out, arrays] uint8, as they are stored.  limits: [out] or [1] float32, the maximum that
    outer scales follow from; None where there are none.
    """

    grid: Grid
    selectors: Tensor | None
    scales: Tensor
    limits: Tensor | None

    @staticmethod
    def of(encoded: Encoded, grid: Grid) -> BlockLevels:
        """Return the levels of an encoded matrix."""
        limits = encoded.limit.reshape(-1).contiguous() if grid.format.rule.outer else None
        return BlockLevels(grid, encoded.selectors, encoded.scales, limits)

    def form(self) -> Form:
        """Return how this is stored."""
        return Form(BLOCK_FORMAT, block_format=self.grid.format)

    def finite(self) -> bool:
        """Tell whether all that is stored is finite."""
        return self.limits is None or bool(torch.isfinite(self.limits).all())

    @cached_property
    def steps(self) -> Tensor:
        """What codewords are multiplied by: [out, arrays] float32."""
        limit = self.scales.new_zeros(1) if self.limits is None else self.limits
        block_format = self.grid.format
        return block_format.rule.read(self.scales, limit[:, None], block_format.top)

    def values(self, codes: Tensor, columns: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return what the codes of some rows and columns stand for: [rows, k] -> float32.

        columns: [k] int64, their places in the matrix.
        """
        books = self.grid.codebooks
        words = codes.long()
        if self.selectors is not None:
            words += (
                self.selectors[rows][:, columns // self.grid.format.block].long() * books.shape[1]
            )
        return books.reshape(-1)[words] * self.steps[rows][:, columns // self.grid.format.array]

    def to(self, device: torch.device) -> BlockLevels:
        """Return the same on another device."""
        return BlockLevels(
            Grid(self.grid.format, self.grid.codebooks.to(device)),
            None if self.selectors is None else self.selectors.to(device),
            self.scales.to(device),
            None if self.limits is None else self.limits.to(device),
        )

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors that are stored of this, by suffix."""
        block_format = self.grid.format
        tensors = {"block_scales": self.scales.contiguous()}
        if self.limits is not None:
            tensors["block_limits"] = self.limits
        if self.selectors is not None:
            tensors["block_selectors"] = pack(self.selectors, block_format.selector_bits)
        if block_format.codewords == LEARNED:
            integers = self.grid.codebooks.reshape(-1).int() + int(block_format.top) + 1
            tensors["block_codebooks"] = pack(integers, block_format.codeword_bits)
        return tensors


def unpack_block_levels(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> BlockLevels:
    """Undo `BlockLevels.stored`.  Raises CheckpointError for codebooks that do not ascend."""
    block_format = layout.block_format
    assert block_format is not None
    selectors = None
    if block_format.codebooks > 1:
        blocks = block_format.blocks(layout.columns)
        packed = tensors["block_selectors"]
        selectors = unpack(packed, block_format.selector_bits, blocks).to(torch.uint8)
        if int(selectors.max()) >= block_format.codebooks:
            raise CheckpointError(f"block_selectors go beyond {block_format.codebooks} codebooks")
    scales = tensors["block_scales"]
    limits = tensors.get("block_limits")
    levels = BlockLevels(_grid(block_format, tensors), selectors, scales, limits)
    if not bool(torch.isfinite(levels.steps).all()) or (limits is not None and limits.min() < 0):
        raise CheckpointError("block_scales or block_limits hold a scale that is none")
    return levels


def _grid(block_format: BlockFormat, tensors: Mapping[str, Tensor]) -> Grid:
    if block_format.codewords != LEARNED:
        return Grid.fixed(block_format)
    entries = 2**block_format.bits
    packed, count = tensors["block_codebooks"], block_format.codebooks * entries
    integers = unpack(packed, block_format.codeword_bits, count) - int(block_format.top) - 1
    books = integers.reshape(block_format.codebooks, entries).float()
    if bool((books.diff(dim=1) < 0).any()):
        raise CheckpointError("block_codebooks hold a codebook that does not ascend")
    return Grid(block_format, books)


def encode_weight(weight: Tensor, grid: Grid) -> tuple[Tensor, BlockLevels]:
    """Bring a matrix into a block format: [out, in] float32 -> codes [out, in] uint8, levels.

    Outer scales are those of rows where the format has it so, else there is one.
    """
    encoded = encode(weight, grid, by_row=grid.format.rule.by_row)
    return encoded.codes, BlockLevels.of(encoded, grid)
