"""What stored forms share whose codes stand for one weight each, column after column.

Codes by width, the map from columns to widths, and reserved entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.payload.base import Layout, Payload
from claq_exp.payload.gather import gathered
from claq_exp.payload.operand import Decoder, Operand, Part, RowScales
from claq_exp.payload.packing import pack, unpack, unpack_some
from claq_exp.payload.stored import HALF_MAX, MAX_BITS, StoredTensor, index_width

BAND = 64  # columns that are dequantized at a time
WIDTHS = tuple(str(width) for width in range(1, MAX_BITS + 1))  # as JSON writes them


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
        places = torch.arange(len(self.counts), device=self.counts.device)
        return torch.repeat_interleave(places, self.counts)


def coded_tensors(layout: Layout) -> dict[str, StoredTensor]:
    """Return suffix -> stored tensor of codes, their widths and the reserved entries."""
    widths = layout.widths()
    tensors = {
        f"codes_{width}": StoredTensor.of_integers((columns,), layout.rows, width, "codes")
        for width, columns in widths.items()
    }
    if len(widths) > 1:
        tensors["column_bits"] = StoredTensor.of_integers(
            (), layout.columns, index_width(len(widths)), "column_bits"
        )
    if layout.reserved:
        places, counts = index_width(layout.rows), layout.most_reserved.bit_length()
        account = "reserved_positions"
        tensors["reserved_values"] = StoredTensor("F16", (layout.reserved,), "reserved_values")
        tensors["reserved_rows"] = StoredTensor.of_integers((), layout.reserved, places, account)
        tensors["reserved_counts"] = StoredTensor.of_integers((), layout.columns, counts, account)
    return tensors


@dataclass(frozen=True, kw_only=True)
class ColumnLayout(Layout):
    """The layout of a form with code widths of its own for every column, and reserved entries.

    columns_per_width: code width in bits -> how many columns have it.
    """

    rows: int
    columns: int
    columns_per_width: dict[int, int]
    reserved: int = 0
    most_reserved: int = 0

    def __post_init__(self) -> None:
        """Raise CheckpointError for numbers that do not fit each other."""
        super().__post_init__()
        widths_fit = all(1 <= width <= MAX_BITS for width in self.columns_per_width)
        if not widths_fit or sum(self.columns_per_width.values()) != self.columns:
            raise CheckpointError(
                f"columns per width {self.columns_per_width} do not make {self.columns} columns"
            )

    @classmethod
    def of(cls, rows: int, column_bits: Tensor, reserved_counts: Tensor, **own: Any) -> Self:
        """Return the layout of a matrix with these column bits [in] and reserved counts [in].

        own: the fields that only this kind has.
        """
        widths, counts = torch.unique(column_bits.cpu(), return_counts=True)
        return cls(
            rows=rows,
            columns=len(column_bits),
            columns_per_width=dict(zip(widths.tolist(), counts.tolist(), strict=True)),
            reserved=int(reserved_counts.sum()),
            most_reserved=int(reserved_counts.max()),
            **own,
        )

    def widths(self) -> dict[int, int]:
        """Return code width in bits -> how many columns have it, in ascending order."""
        return dict(sorted(self.columns_per_width.items()))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; JSON keys are strings."""
        data = super().to_json()
        data["columns_per_width"] = {str(width): n for width, n in self.columns_per_width.items()}
        return data

    @classmethod
    def _fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        widths = data["columns_per_width"]
        if not isinstance(widths, dict) or not widths:
            raise CheckpointError("a layout has no columns_per_width")
        for width, columns in widths.items():
            if width not in WIDTHS or type(columns) is not int or columns < 1:
                raise CheckpointError(f"a layout has columns of '{width}' bits: {columns}")
        return {**data, "columns_per_width": {int(width): n for width, n in widths.items()}}


@dataclass(frozen=True)
class Lookups:
    """What the codes of a matrix stand for, as `Operand` has it; on the CPU but for `decoder`.

    levels: [in, 2**widest] float32.  widest: the largest magnitude that a code can stand for.
    row_levels: [out, 2**width] float32.
    """

    widest: float
    levels: Tensor | None = None
    grid: RowScales | None = None
    row_scales: Tensor | None = None
    decoder: Decoder | None = None
    row_levels: Tensor | None = None


@dataclass(frozen=True)
class ColumnPayload(Payload):
    """The base of these forms.

    codes: [out, in] uint8 (reserved entries have code 0).  column_bits: [in] uint8.
    """

    codes: Tensor
    column_bits: Tensor
    reserved: Reserved

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.codes.shape
        return rows, columns

    @abstractmethod
    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some columns and what their codes stand for, of any size: [out, some] float."""

    @abstractmethod
    def _pack_own(self, columns_of: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return the stored tensors of this kind alone.

        columns_of: width -> [in] bool, the columns that have it.
        """

    @classmethod
    @abstractmethod
    def _unpack_own(
        cls, layout: Any, tensors: Mapping[str, Tensor], column_bits: Tensor
    ) -> dict[str, Any]:
        """Return the fields of this kind alone, from stored tensors on the CPU.

        Raises CheckpointError where they mean nothing.
        """

    @abstractmethod
    def _lookups(self, device: torch.device) -> Lookups:
        """Return what codes stand for, for kernels on a device; codes are not there."""

    def dequantize(self) -> Tensor:
        """Return the matrix that the codes stand for, see Payload."""
        doubles = any(leaf.dtype == torch.float64 for leaf in self.trainable().values())
        dtype = torch.float64 if doubles else torch.float32
        weight = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for columns, part in self._parts():
            weight[:, columns] = part
        weight.clamp_(-HALF_MAX, HALF_MAX)  # a float16 model must be able to hold it
        weight[self.reserved.rows, self.reserved.columns()] = self.reserved.values.to(dtype)
        return weight

    def clamped(self) -> int:
        """Return how many weights are beyond float16 by their code, and are cut to its range."""
        kept, total = self.reserved.columns(), 0
        for columns, part in self._parts():
            beyond = part.abs() > HALF_MAX
            mine = (columns.start <= kept) & (kept < columns.stop)
            beyond[self.reserved.rows[mine], kept[mine] - columns.start] = False
            total += int(beyond.sum())
        return total

    def trainable(self) -> dict[str, Tensor]:
        """Return the values of the reserved entries, where there are any."""
        values = self.reserved.values
        return {"reserved_values": values} if len(values) else {}

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are."""
        same = super().with_values(values)
        kept = values.get("reserved_values", self.reserved.values)
        return replace(same, reserved=replace(self.reserved, values=kept))

    def pack(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix, see Payload."""
        layout = self.layout()
        widths = layout.widths()
        columns_of = {width: self.column_bits == width for width in widths}
        tensors = {
            f"codes_{width}": pack(self.codes.t()[columns], width)
            for width, columns in columns_of.items()
        }
        tensors |= self._pack_own(columns_of)
        if len(widths) > 1:
            position = torch.searchsorted(
                torch.tensor(list(widths), dtype=torch.uint8), self.column_bits
            )
            tensors["column_bits"] = pack(position, index_width(len(widths)))
        if layout.reserved:
            counts = self.reserved.counts
            tensors["reserved_values"] = self.reserved.values
            tensors["reserved_rows"] = pack(self.reserved.rows, index_width(layout.rows))
            tensors["reserved_counts"] = pack(counts, layout.most_reserved.bit_length())
        return tensors

    @classmethod
    def unpack(cls, layout: Any, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild a matrix, on the CPU, from its stored tensors; see Payload."""
        side = cls._without_codes(layout, tensors)
        codes = torch.zeros(layout.columns, layout.rows, dtype=torch.uint8)
        for width in layout.widths():
            unpacked = unpack(tensors[f"codes_{width}"], width, layout.rows)
            codes[side.column_bits == width] = unpacked.to("cpu", torch.uint8)
        return replace(side, codes=codes.t())

    @classmethod
    def reserved_counts(cls, layout: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the reserved entries of every column, [in] int64; leaves the codes packed."""
        return cls._without_codes(layout, tensors).reserved.counts

    @classmethod
    def operand(cls, layout: Any, tensors: Mapping[str, Tensor]) -> Operand:
        """Return the matrix as kernels read it; the codes are the stored bytes, not a copy."""
        side = cls._without_codes(layout, tensors)
        device = tensors[f"codes_{min(layout.widths())}"].device
        found = side._lookups(device)
        parts = []
        for width in layout.widths():
            chosen = torch.nonzero(side.column_bits == width).flatten()
            own = None
            if found.levels is not None:
                own = found.levels[chosen, : 2**width].contiguous().to(device)
            places = None if len(chosen) == layout.columns else chosen.to(device)
            parts.append(Part(width, places, tensors[f"codes_{width}"], own))
        return Operand(
            rows=layout.rows,
            columns=layout.columns,
            parts=tuple(parts),
            grid=None if found.grid is None else found.grid.to(device),
            row_scales=None if found.row_scales is None else found.row_scales.to(device),
            reserved_rows=side.reserved.rows.to(device, torch.int32),
            reserved_columns=side.reserved.columns().to(device, torch.int32),
            reserved_values=side.reserved.values.float().to(device),
            clamps=found.widest > HALF_MAX,
            decoder=found.decoder,
            row_levels=None if found.row_levels is None else found.row_levels.to(device),
        )

    @classmethod
    def rows(cls, layout: Any, tensors: Mapping[str, Tensor], index: Tensor) -> Tensor:
        """Return some rows of the matrix, see Payload; the other codes stay packed."""
        return gathered(cls.operand(layout, tensors), index)

    @classmethod
    def _without_codes(cls, layout: Any, tensors: Mapping[str, Tensor]) -> Self:
        """Unpack, on the CPU, all but the codes: those have no content."""
        layout.check(tensors)
        small = {
            suffix: tensor if suffix.startswith("codes_") else tensor.cpu()
            for suffix, tensor in tensors.items()
        }
        column_bits = _unpack_column_bits(layout, small)
        own = cls._unpack_own(layout, small, column_bits)
        reserved = _unpack_reserved(layout, small)
        _check_reserved_codes(tensors, column_bits, reserved)
        codes = torch.empty(layout.rows, layout.columns, dtype=torch.uint8, device="meta")
        return cls(codes, column_bits, reserved, **own)


def bands(columns: int) -> Iterator[slice]:
    """Yield the columns of a matrix, a few at a time."""
    return (slice(start, min(start + BAND, columns)) for start in range(0, columns, BAND))


def looked_up(levels: Tensor, codes: Tensor, columns: slice) -> Tensor:
    """Return what the codes of some columns stand for: [out, in] uint8 -> [out, some] float.

    levels: [in, 2**widest].
    """
    places = codes[:, columns].t().long()
    return torch.gather(levels[columns], 1, places).t()


def _unpack_column_bits(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    expected = layout.widths()
    widths = torch.tensor(list(expected), dtype=torch.uint8)
    if len(widths) == 1:
        return widths.expand(layout.columns).clone()
    position = unpack(tensors["column_bits"], index_width(len(widths)), layout.columns).long()
    counts = torch.bincount(position, minlength=len(widths)).tolist()
    if counts != list(expected.values()):
        raise CheckpointError(f"column_bits give {counts} columns, the layout {expected}")
    return widths[position]


def _unpack_reserved(layout: Layout, tensors: Mapping[str, Tensor]) -> Reserved:
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
