"""Stored forms of a quantized matrix: one file for each, found by its kind.

A new form is a file with a layout and a payload (`claq_exp.payload.base`) and a line of `PAYLOAD`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from claq_exp.errors import CheckpointError, one_of
from claq_exp.payload.base import Layout, Payload
from claq_exp.payload.block_format import BlockCodes
from claq_exp.payload.column_codebooks import ColumnCodebooks
from claq_exp.payload.group_table import GroupTable
from claq_exp.payload.operand import Operand
from claq_exp.payload.row_codebooks import RowCodebooks
from claq_exp.payload.row_grid import RealGrid, RowGrid
from claq_exp.payload.shared_codebooks import SharedCodebooks
from claq_exp.payload.sign_scales import SignScales
from claq_exp.payload.snapped_codebooks import SnappedCodebooks

PAYLOAD: dict[str, type[Payload]] = {
    member.kind: member
    for member in (
        BlockCodes,
        ColumnCodebooks,
        GroupTable,
        RealGrid,
        RowCodebooks,
        RowGrid,
        SharedCodebooks,
        SignScales,
        SnappedCodebooks,
    )
}


def read_layout(data: Any) -> Layout:
    """Return the layout that `Layout.to_json` described.  Raises CheckpointError on anything else.

    All keys of its kind must be there, and no others.
    """
    if not isinstance(data, dict):
        raise CheckpointError("a layout is no JSON object")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in PAYLOAD:
        raise CheckpointError(one_of("kind of a quantized weight", kind, PAYLOAD))
    own = {key: value for key, value in data.items() if key != "kind"}
    return PAYLOAD[kind].layout_class.from_json(own)


def unpack_weight(layout: Layout, tensors: Mapping[str, Tensor]) -> Payload:
    """Rebuild a matrix, on the CPU, from its stored tensors.

    Raises CheckpointError where they do not fit the layout.
    """
    return PAYLOAD[layout.kind].unpack(layout, tensors)


def operand_of(layout: Layout, tensors: Mapping[str, Tensor]) -> Operand:
    """Return a matrix as kernels read it, all but the codes decoded; raises as above."""
    return PAYLOAD[layout.kind].operand(layout, tensors)


def reserved_counts(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the reserved entries of every column, [in] int64; raises as above."""
    return PAYLOAD[layout.kind].reserved_counts(layout, tensors)


def rows_of(layout: Layout, tensors: Mapping[str, Tensor], index: Tensor) -> Tensor:
    """Return some rows of a matrix, [n, in] float32, without the others; see `Payload.rows`."""
    return PAYLOAD[layout.kind].rows(layout, tensors, index)
