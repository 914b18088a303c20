"""The result of quantizing one matrix, and its way to stored tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.quantize.layout import (
    COLUMN_CODEBOOKS,
    HALF_MAX,
    ROW_GRID,
    Ledger,
    WeightLayout,
    index_width,
)
from claq_exp.quantize.packing import pack, unpack


@dataclass(frozen=True)
class ColumnCodebooks:
    """One codebook per input column.

    values: [in, 2**widest] float16; entries past a column's 2**bits are zero and unused.
    """

    values: Tensor

    def finite(self) -> bool:
        """Tell whether every level fits float16."""
        return bool(torch.isfinite(self.values).all())


@dataclass(frozen=True)
class RowGrid:
    """A uniform grid per output row and group of `group_size` columns: w = scale * (code - zero).

    scales: [out, groups] float16.  zeros: [out, groups] uint8.
    """

    scales: Tensor
    zeros: Tensor
    group_size: int

    def finite(self) -> bool:
        """Tell whether every scale fits float16."""
        return bool(torch.isfinite(self.scales).all())


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
    levels: ColumnCodebooks | RowGrid
    reserved: Reserved

    def dequantize(self) -> Tensor:
        """Return the matrix that the codes stand for: [out, in] float32."""
        if isinstance(self.levels, ColumnCodebooks):
            weight = (
                torch.gather(self.levels.values.float(), 1, self.codes.t().long()).t().contiguous()
            )
        else:
            columns = self.codes.shape[1]
            group = torch.arange(columns) // self.levels.group_size
            scales = self.levels.scales.float()[:, group]
            weight = scales * (self.codes.float() - self.levels.zeros.float()[:, group])
            weight.clamp_(-HALF_MAX, HALF_MAX)  # a float16 model must be able to hold it
        weight[self.reserved.rows, self.reserved.columns()] = self.reserved.values.float()
        return weight

    def layout(self) -> WeightLayout:
        """Describe how this matrix is stored."""
        rows = self.codes.shape[0]
        return layout_of(rows, self.column_bits, self.levels, self.reserved.counts)

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
            else:
                tensors["scales"] = self.levels.scales.contiguous()
                tensors["zeros"] = pack(self.levels.zeros.reshape(-1), width)
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


def layout_of(
    rows: int, column_bits: Tensor, levels: ColumnCodebooks | RowGrid, reserved_counts: Tensor
) -> WeightLayout:
    """Return the layout of a matrix with these column bits [in] and reserved counts [in]."""
    widths, counts = torch.unique(column_bits, return_counts=True)
    grid = levels if isinstance(levels, RowGrid) else None
    return WeightLayout(
        kind=ROW_GRID if grid else COLUMN_CODEBOOKS,
        rows=rows,
        columns=len(column_bits),
        columns_per_width=dict(zip(widths.tolist(), counts.tolist(), strict=True)),
        group_size=grid.group_size if grid else 0,
        reserved=int(reserved_counts.sum()),
        most_reserved=int(reserved_counts.max()),
    )


def unpack_weight(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """Rebuild a matrix from its stored tensors.

    Raises CheckpointError where they do not fit the layout.
    """
    _check_tensors(layout, tensors)
    column_bits = _unpack_column_bits(layout, tensors)
    codes = torch.zeros(layout.columns, layout.rows, dtype=torch.uint8)
    values = torch.zeros(layout.columns, 2 ** max(layout.columns_per_width), dtype=torch.float16)
    for width in layout.columns_per_width:
        columns = column_bits == width
        codes[columns] = unpack(tensors[f"codes_{width}"], width, layout.rows).to(torch.uint8)
        if layout.kind == COLUMN_CODEBOOKS:
            values[columns, : 2**width] = tensors[f"codebooks_{width}"]
    levels: ColumnCodebooks | RowGrid = ColumnCodebooks(values)
    if layout.kind == ROW_GRID:
        (width,) = layout.columns_per_width
        zeros = unpack(tensors["zeros"], width, layout.rows * layout.groups)
        zeros = zeros.to(torch.uint8).reshape(layout.rows, layout.groups)
        levels = RowGrid(tensors["scales"], zeros, layout.group_size)
    return QuantizedWeight(codes.t(), column_bits, levels, _unpack_reserved(layout, tensors))


def _check_tensors(layout: WeightLayout, tensors: Mapping[str, Tensor]) -> None:
    expected = layout.stored_tensors()
    if set(tensors) != set(expected):
        raise CheckpointError(
            f"stored tensors {sorted(tensors)} where the layout asks for {sorted(expected)}"
        )
    dtypes = {"F16": torch.float16, "U8": torch.uint8}
    for suffix, spec in expected.items():
        tensor = tensors[suffix]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != dtypes[spec.dtype]:
            raise CheckpointError(
                f"{suffix} is {tensor.dtype} {tuple(tensor.shape)}, the layout asks for "
                f"{spec.dtype} {spec.shape}"
            )
        if spec.dtype == "F16" and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{suffix} holds a value that is not finite")


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
    if int(counts.sum()) != layout.reserved or int(rows.max()) >= layout.rows:
        raise CheckpointError(
            "reserved entries lie outside the matrix or do not add up to the layout's count"
        )
    return Reserved(counts, rows, tensors["reserved_values"])
