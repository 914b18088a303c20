"""The form `block_format`: a scale for each array of a row, a codebook for each block.

MXFP4, NVFP4, VS-Quant, block floating point and LO-BCQ, see docs/bcq.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError, NumericalError
from claq_exp.number_formats.formats import LEARNED, BlockFormat
from claq_exp.number_formats.levels import BlockLevels
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.payload.base import Layout, moved_to
from claq_exp.payload.columns import ColumnPayload, Lookups, Reserved, bands, coded_tensors
from claq_exp.payload.packing import pack, unpack
from claq_exp.payload.stored import StoredTensor


@dataclass(frozen=True, kw_only=True)
class BlockFormatLayout(Layout):
    """The layout of a block format: codes of its own width, and no reserved entries."""

    kind: ClassVar[str] = "block_format"

    rows: int
    columns: int
    block_format: BlockFormat

    def __post_init__(self) -> None:
        """Raise CheckpointError for a format that is stored for no weight."""
        super().__post_init__()
        if not self.block_format.array or self.block_format.rule.bits != 8:
            raise CheckpointError("a weight in a block format has scales of 8 bits for its arrays")

    def widths(self) -> dict[int, int]:
        """Return the one width of codes -> columns."""
        return {self.block_format.bits: self.columns}

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return codes, scales, and selectors and codebooks where the format has them."""
        form = self.block_format
        arrays, blocks = form.arrays(self.columns), form.blocks(self.columns)
        tensors = coded_tensors(self)
        tensors["block_scales"] = StoredTensor("U8", (self.rows, arrays), "scales")
        if form.rule.outer:
            limits = self.rows if form.rule.by_row else 1
            tensors["block_limits"] = StoredTensor("F32", (limits,), "scales")
        if blocks:
            tensors["block_selectors"] = StoredTensor.of_integers(
                (self.rows,), blocks, form.selector_bits, "codebooks"
            )
        if form.codewords == LEARNED:
            tensors["block_codebooks"] = StoredTensor.of_integers(
                (), form.codebooks * 2**form.bits, form.codeword_bits, "codebooks"
            )
        return tensors

    def describe(self) -> str:
        """Return the format in a few words."""
        return self.block_format.describe()

    @classmethod
    def _fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return {**data, "block_format": BlockFormat(**data["block_format"])}


@dataclass(frozen=True)
class BlockCodes(ColumnPayload):
    """A matrix in a block format; nothing is reserved, and all columns have one width."""

    kind: ClassVar[str] = BlockFormatLayout.kind
    layout_class: ClassVar[type[Layout]] = BlockFormatLayout

    blocks: BlockLevels

    @staticmethod
    def of(codes: Tensor, blocks: BlockLevels) -> BlockCodes:
        """Return the matrix of these codes: [out, in] uint8."""
        columns = codes.shape[1]
        widths = torch.full((columns,), blocks.grid.format.bits, dtype=torch.uint8)
        return BlockCodes(codes, widths, Reserved.none(columns), blocks)

    def layout(self) -> BlockFormatLayout:
        """Describe how this matrix is stored."""
        rows, columns = self.shape
        return BlockFormatLayout(rows=rows, columns=columns, block_format=self.blocks.grid.format)

    def finite(self) -> bool:
        """Tell whether all that is stored is finite."""
        limits = self.blocks.limits
        return super().finite() and (limits is None or bool(torch.isfinite(limits).all()))

    def trainable(self) -> dict[str, Tensor]:
        """Return `steps` [out, arrays], and `codewords` [codebooks, 2**bits] if they are learned.

        Steps are what codewords are multiplied by; what is stored of them are 8 bits each.
        """
        grid = self.blocks.grid
        words = {"codewords": grid.codebooks} if grid.format.codewords == LEARNED else {}
        return {"steps": self.blocks.steps} | words

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        same = super().with_values(values)
        blocks = replace(self.blocks, free_steps=values.get("steps", self.blocks.free_steps))
        if "codewords" in values:
            blocks = replace(blocks, grid=FormatCodebooks(blocks.grid.format, values["codewords"]))
        return replace(same, blocks=blocks)

    def rebuilt(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers, rounded to 8-bit scales and integer codewords.

        Codewords are sorted, and the codes with them.
        Raises NumericalError for a number that is not finite.
        """
        if not all(bool(torch.isfinite(given).all()) for given in values.values()):
            raise NumericalError("steps or codewords hold a number that is not finite")
        changed = self.with_values(values)
        blocks = changed.blocks.rounded()
        if "codewords" not in values:
            return replace(changed, blocks=blocks)
        top = int(blocks.grid.format.top)
        words = values["codewords"].detach().float().round().clamp(-top - 1, top)
        ascending, order = words.sort(dim=1, stable=True)
        places = torch.argsort(order, dim=1).to(torch.uint8)  # old code -> new code
        chosen = torch.arange(self.shape[1], device=self.codes.device)
        table = replace(
            blocks,
            grid=FormatCodebooks(blocks.grid.format, places.float()),
            free_steps=torch.ones_like(blocks.steps),
        )
        codes = table.values(self.codes, chosen).to(torch.uint8)
        blocks = replace(blocks, grid=FormatCodebooks(blocks.grid.format, ascending))
        return replace(changed, codes=codes, blocks=blocks)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        for columns in bands(self.shape[1]):
            places = torch.arange(columns.start, columns.stop, device=self.codes.device)
            yield columns, self.blocks.values(self.codes[:, columns], places)

    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        blocks, form = self.blocks, self.blocks.grid.format
        if blocks.free_steps is not None:
            raise ValueError("these steps are not rounded to what is stored; see `rebuilt`")
        tensors = {"block_scales": blocks.scales.contiguous()}
        if blocks.limits is not None:
            tensors["block_limits"] = blocks.limits
        if blocks.selectors is not None:
            tensors["block_selectors"] = pack(blocks.selectors, form.selector_bits)
        if form.codewords == LEARNED:
            integers = blocks.grid.codebooks.reshape(-1).int() + int(form.top) + 1
            tensors["block_codebooks"] = pack(integers, form.codeword_bits)
        return tensors

    @classmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        form: BlockFormat = layout.block_format
        selectors = None
        if form.codebooks > 1:
            blocks = form.blocks(layout.columns)
            packed = tensors["block_selectors"]
            selectors = unpack(packed, form.selector_bits, blocks).to(torch.uint8)
            if int(selectors.max()) >= form.codebooks:
                raise CheckpointError(f"block_selectors go beyond {form.codebooks} codebooks")
        limits = tensors.get("block_limits")
        levels = BlockLevels(_grid(form, tensors), selectors, tensors["block_scales"], limits)
        if not bool(torch.isfinite(levels.steps).all()) or (
            limits is not None and limits.min() < 0
        ):
            raise CheckpointError("block_scales or block_limits hold a scale that is none")
        return {"blocks": levels}

    def _lookups(self, device: torch.device) -> Lookups:
        widest = float(self.blocks.steps.max() * self.blocks.grid.codebooks.abs().max())
        return Lookups(widest, decoder=moved_to(self.blocks, device))


def _grid(form: BlockFormat, tensors: Mapping[str, Tensor]) -> FormatCodebooks:
    if form.codewords != LEARNED:
        return FormatCodebooks.fixed(form)
    entries = 2**form.bits
    count = form.codebooks * entries
    integers = unpack(tensors["block_codebooks"], form.codeword_bits, count) - int(form.top) - 1
    books = integers.reshape(form.codebooks, entries).float()
    if bool((books.diff(dim=1) < 0).any()):
        raise CheckpointError("block_codebooks hold a codebook that does not ascend")
    return FormatCodebooks(form, books)
