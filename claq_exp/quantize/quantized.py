"""The result of quantizing one matrix, and its way to stored tensors and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.quantize.layout import (
    BLOCK_FORMAT,
    HALF_MAX,
    ROW_GRID,
    STORED_DTYPES,
    Form,
    Ledger,
    WeightLayout,
    index_width,
)
from claq_exp.quantize.number_formats.formats import LEARNED
from claq_exp.quantize.number_formats.levels import BlockLevels, unpack_block_levels
from claq_exp.quantize.packing import pack, unpack, unpack_some
from claq_exp.quantize.symmetric import bands


@dataclass(frozen=True)
class ColumnCodebooks:
    """One codebook per input column.

    values: [in, 2**widest] float16; entries past a column's 2**bits are zero and unused.
    row_scales: [out] float16 that multiply what the codebooks give, or None.
    """

    values: Tensor
    row_scales: Tensor | None = None

    def form(self) -> Form:
        """Return how this is stored."""
        return Form(row_scaled=self.row_scales is not None)

    def levels(self, _: Tensor) -> Tensor:
        """Return the levels of every column: [in, 2**widest] float32."""
        return self.values.float()

    def finite(self) -> bool:
        """Tell whether every level fits float16."""
        return bool(torch.isfinite(self.values).all()) and _finite(self.row_scales)


@dataclass(frozen=True)
class SharedCodebooks:
    """One codebook per width for the whole matrix, moved and stretched for every column.

    books: width -> [2**width] float16, ascending.  column_scales: [in, 2] float16, scale and shift.
    row_scales: as in ColumnCodebooks.
    """

    books: dict[int, Tensor]
    column_scales: Tensor
    row_scales: Tensor | None = None

    def form(self) -> Form:
        """Return how this is stored."""
        return Form(shared_codebooks=True, row_scaled=self.row_scales is not None)

    def levels(self, column_bits: Tensor) -> Tensor:
        """Return the levels of every column: [in, 2**widest] float32."""
        levels = torch.zeros(len(column_bits), 2 ** max(self.books))
        scales = self.column_scales.float()
        for width, book in self.books.items():
            columns = column_bits == width
            scale, shift = scales[columns].split(1, dim=1)
            levels[columns, : 2**width] = scale * book.float() + shift
        return levels

    def finite(self) -> bool:
        """Tell whether every scale and level fits float16."""
        books = all(bool(torch.isfinite(book).all()) for book in self.books.values())
        return books and _finite(self.column_scales) and _finite(self.row_scales)


@dataclass(frozen=True)
class RowGrid:
    """A uniform grid per output row and group of `group_size` columns: w = scale * (code - zero).

    scales: [out, groups] float16.  zeros: [out, groups] uint8.
    """

    scales: Tensor
    zeros: Tensor
    group_size: int

    def form(self) -> Form:
        """Return how this is stored."""
        return Form(ROW_GRID, self.group_size)

    def finite(self) -> bool:
        """Tell whether every scale fits float16."""
        return bool(torch.isfinite(self.scales).all())


Levels = ColumnCodebooks | SharedCodebooks | RowGrid | BlockLevels


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())


@dataclass(frozen=True)
class Reserved:
    """Entries kept in float16, column after column.

    counts: [in] int64, entries per column.  rows: [total] int64, ascending inside a column.
    values: [total] float16.
    """

    counts: Tensor
    rows: Tensor
    values: Tensor

    @staticmethod
    def none(columns: int) -> Reserved:
        """No entry in any column."""
        empty = torch.zeros(0, dtype=torch.int64)
        return Reserved(
            torch.zeros(columns, dtype=torch.int64), empty, torch.zeros(0, dtype=torch.float16)
        )

    def columns(self) -> Tensor:
        """Return the column of each entry: [total] int64."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix.

    codes: [out, in] uint8 (reserved entries have code 0).  column_bits: [in] uint8.
    """

    codes: Tensor
    column_bits: Tensor
    levels: Levels
    reserved: Reserved

    def dequantize(self) -> Tensor:
        """Return the matrix that the codes stand for: [out, in] float32."""
        weight = torch.empty(self.codes.shape)
        for columns, part in self._parts():
            weight[:, columns] = part
        weight.clamp_(-HALF_MAX, HALF_MAX)  # a float16 model must be able to hold it
        weight[self.reserved.rows, self.reserved.columns()] = self.reserved.values.float()
        return weight

    def clamped(self) -> int:
        """Return how many weights are beyond float16 by their code, and are cut to its range."""
        if isinstance(self.levels, ColumnCodebooks) and self.levels.row_scales is None:
            return 0
        kept, total = self.reserved.columns(), 0
        for columns, part in self._parts():
            beyond = part.abs() > HALF_MAX
            mine = (columns.start <= kept) & (kept < columns.stop)
            beyond[self.reserved.rows[mine], kept[mine] - columns.start] = False
            total += int(beyond.sum())
        return total

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some columns and what their codes stand for, of any size: [out, some] float32."""
        if isinstance(self.levels, RowGrid):
            for columns in bands(self.codes.shape[1]):
                group = torch.arange(columns.start, columns.stop) // self.levels.group_size
                steps = self.codes[:, columns].float() - self.levels.zeros[:, group].float()
                yield columns, steps.mul_(self.levels.scales[:, group].float())
            return
        if isinstance(self.levels, BlockLevels):
            for columns in bands(self.codes.shape[1]):
                places = torch.arange(columns.start, columns.stop)
                yield columns, self.levels.values(self.codes[:, columns], places)
            return
        levels = self.levels.levels(self.column_bits)
        for columns in bands(self.codes.shape[1]):
            codes = self.codes[:, columns].t().long()
            part = torch.gather(levels[columns], 1, codes).t()
            if self.levels.row_scales is not None:
                part *= self.levels.row_scales.float()[:, None]
            yield columns, part

    def layout(self) -> WeightLayout:
        """Describe how this matrix is stored."""
        rows = self.codes.shape[0]
        return layout_of(rows, self.column_bits, self.levels.form(), self.reserved.counts)

    def ledger(self) -> Ledger:
        """Return the bits of everything that is stored of this matrix."""
        return self.layout().ledger()

    def pack(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix, shaped as `layout().stored_tensors()` says."""
        layout = self.layout()
        tensors: dict[str, Tensor] = {}
        for width in layout.columns_per_width:
            columns = self.column_bits == width
            tensors[f"codes_{width}"] = pack(self.codes.t()[columns], width)
            if isinstance(self.levels, ColumnCodebooks):
                tensors[f"codebooks_{width}"] = self.levels.values[columns, : 2**width].contiguous()
            elif isinstance(self.levels, SharedCodebooks):
                tensors[f"codebooks_{width}"] = self.levels.books[width]
            elif isinstance(self.levels, RowGrid):
                tensors["scales"] = self.levels.scales.contiguous()
                tensors["zeros"] = pack(self.levels.zeros.reshape(-1), width)
        if isinstance(self.levels, SharedCodebooks):
            tensors["column_scales"] = self.levels.column_scales
        if isinstance(self.levels, BlockLevels):
            tensors |= self.levels.stored()
        elif not isinstance(self.levels, RowGrid) and self.levels.row_scales is not None:
            tensors["row_scales"] = self.levels.row_scales
        if len(layout.columns_per_width) > 1:
            widths = torch.tensor(sorted(layout.columns_per_width), dtype=torch.uint8)
            position = torch.searchsorted(widths, self.column_bits)
            tensors["column_bits"] = pack(position, index_width(len(widths)))
        if layout.reserved:
            tensors["reserved_values"] = self.reserved.values
            tensors["reserved_rows"] = pack(self.reserved.rows, index_width(layout.rows))
            tensors["reserved_counts"] = pack(
                self.reserved.counts, layout.most_reserved.bit_length()
            )
        return tensors


def layout_of(rows: int, column_bits: Tensor, form: Form, reserved_counts: Tensor) -> WeightLayout:
    """Return the layout of a matrix with these column bits [in] and reserved counts [in]."""
    widths, counts = torch.unique(column_bits, return_counts=True)
    block_format = form.block_format
    if block_format is not None:
        block_format = replace(block_format, bits=int(widths[0]))
    return WeightLayout(
        kind=form.kind,
        rows=rows,
        columns=len(column_bits),
        columns_per_width=dict(zip(widths.tolist(), counts.tolist(), strict=True)),
        group_size=form.group_size,
        shared_codebooks=form.shared_codebooks,
        row_scaled=form.row_scaled,
        reserved=int(reserved_counts.sum()),
        most_reserved=int(reserved_counts.max()),
        block_format=block_format,
    )


@dataclass(frozen=True)
class SideTensors:
    """All that is stored of a matrix but its codes, unpacked.

    column_bits: [in] uint8.
    """

    column_bits: Tensor
    levels: Levels
    reserved: Reserved


def unpack_side_tensors(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> SideTensors:
    """Unpack, on the CPU, what is stored of a matrix besides its codes.

    Raises CheckpointError where the tensors do not fit the layout.
    """
    _check_tensors(layout, tensors)
    small = {
        suffix: tensor if suffix.startswith("codes_") else tensor.cpu()
        for suffix, tensor in tensors.items()
    }
    column_bits = _unpack_column_bits(layout, small)
    levels = _unpack_levels(layout, small, column_bits)
    reserved = _unpack_reserved(layout, small)
    _check_reserved_codes(tensors, column_bits, reserved)
    return SideTensors(column_bits, levels, reserved)


def unpack_weight(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Rebuild a matrix from its stored tensors.

    Raises CheckpointError where they do not fit the layout.
    """
    side = unpack_side_tensors(layout, tensors)
    codes = torch.zeros(layout.columns, layout.rows, dtype=torch.uint8)
    for width in layout.columns_per_width:
        unpacked = unpack(tensors[f"codes_{width}"], width, layout.rows)
        codes[side.column_bits == width] = unpacked.to(torch.uint8)
    return QuantizedWeight(codes.t(), side.column_bits, side.levels, side.reserved)


def _unpack_levels(
    layout: WeightLayout, tensors: Mapping[str, Tensor], column_bits: Tensor
) -> Levels:
    if layout.kind == ROW_GRID:
        (width,) = layout.columns_per_width
        zeros = unpack(tensors["zeros"], width, layout.rows * layout.groups)
        zeros = zeros.to(torch.uint8).reshape(layout.rows, layout.groups)
        return RowGrid(tensors["scales"], zeros, layout.group_size)
    if layout.kind == BLOCK_FORMAT:
        return unpack_block_levels(layout, tensors)
    row_scales = tensors.get("row_scales")
    books = {width: tensors[f"codebooks_{width}"] for width in layout.columns_per_width}
    if layout.shared_codebooks:
        return SharedCodebooks(books, tensors["column_scales"], row_scales)
    values = torch.zeros(layout.columns, 2 ** max(books), dtype=torch.float16)
    for width, book in books.items():
        values[column_bits == width, : 2**width] = book
    return ColumnCodebooks(values, row_scales)


def _check_tensors(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> None:
    expected = layout.stored_tensors()
    if set(tensors) != set(expected):
        raise CheckpointError(
            f"stored tensors {sorted(tensors)} where the layout asks for {sorted(expected)}"
        )
    for suffix, spec in expected.items():
        tensor = tensors[suffix]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != STORED_DTYPES[spec.dtype]:
            raise CheckpointError(
                f"{suffix} is {tensor.dtype} {tuple(tensor.shape)}, the layout asks for "
                f"{spec.dtype} {spec.shape}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{suffix} holds a value that is not finite")
    for suffix, (count, width) in _packed_rows(layout).items():
        used = count * width % 8
        if used and bool((tensors[suffix][..., -1] >> used).any()):
            raise CheckpointError(f"{suffix} has padding bits that are not 0")


def _packed_rows(layout: WeightLayout) -> dict[str, tuple[int, int]]:
    """Return suffix -> (integers in a row, their width) for all packed tensors of a layout."""
    packed = {f"codes_{width}": (layout.rows, width) for width in layout.columns_per_width}
    if layout.kind == ROW_GRID:
        (width,) = layout.columns_per_width
        packed["zeros"] = (layout.rows * layout.groups, width)
    if (blocks := layout.block_format) is not None:
        if blocks.codebooks > 1:
            packed["block_selectors"] = (blocks.blocks(layout.columns), blocks.selector_bits)
        if blocks.codewords == LEARNED:
            packed["block_codebooks"] = (blocks.codebooks * 2**blocks.bits, blocks.codeword_bits)
    if len(layout.columns_per_width) > 1:
        packed["column_bits"] = (layout.columns, index_width(len(layout.columns_per_width)))
    if layout.reserved:
        packed["reserved_rows"] = (layout.reserved, index_width(layout.rows))
        packed["reserved_counts"] = (layout.columns, layout.most_reserved.bit_length())
    return packed


def _unpack_column_bits(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> Tensor:
    widths = torch.tensor(sorted(layout.columns_per_width), dtype=torch.uint8)
    if len(widths) == 1:
        return widths.expand(layout.columns).clone()
    position = unpack(tensors["column_bits"], index_width(len(widths)), layout.columns).long()
    counts = torch.bincount(position, minlength=len(widths)).tolist()
    if counts != [layout.columns_per_width[width] for width in widths.tolist()]:
        raise CheckpointError(
            f"column_bits give {counts} columns, the layout {layout.columns_per_width}"
        )
    return widths[position]


def _unpack_reserved(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> Reserved:
    if not layout.reserved:
        return Reserved.none(layout.columns)
    counts = unpack(
        tensors["reserved_counts"], layout.most_reserved.bit_length(), layout.columns
    ).long()
    width = index_width(layout.rows)
    if width:
        rows = unpack(tensors["reserved_rows"], width, layout.reserved).long()
    else:
        rows = torch.zeros(layout.reserved, dtype=torch.int64)
    if int(counts.sum()) != layout.reserved or int(counts.max()) != layout.most_reserved:
        raise CheckpointError("reserved_counts do not add up to what the layout says")
    reserved = Reserved(counts, rows, tensors["reserved_values"])
    places = reserved.columns() * layout.rows + rows
    if int(rows.max()) >= layout.rows or bool((places.diff() <= 0).any()):
        raise CheckpointError("reserved_rows lie outside the matrix or do not ascend in a column")
    return reserved


def _check_reserved_codes(
    tensors: Mapping[str, Tensor], column_bits: Tensor, reserved: Reserved
) -> None:
    """Raise CheckpointError unless the code of every reserved entry is 0, as kernels count on."""
    owners = reserved.columns()
    for width in column_bits[owners].unique().tolist():
        codes = tensors[f"codes_{width}"]
        lines = torch.cumsum(column_bits == width, 0) - 1  # column -> its line of codes
        own = column_bits[owners] == width
        places = lines[owners[own]].to(codes.device), reserved.rows[own].to(codes.device)
        if bool(unpack_some(codes, width, *places).any()):
            raise CheckpointError("a reserved entry has a code other than 0")
