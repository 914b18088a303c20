"""Matrices of any width and shape through a weights file: equal codes, as many bits as counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from claq_exp.errors import CheckpointError
from claq_exp.payload import (
    ColumnCodebooks,
    RowGrid,
    SharedCodebooks,
    operand_of,
    unpack_weight,
)
from claq_exp.payload.columns import ColumnPayload, Reserved
from claq_exp.tensor_files.shards import Unit, open_tensors, read_spans, save_units

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
SHAPES = [(1, 1), (1, 576), (49, 1), (49, 31), (7, 576)]  # [rows, columns]
PAYLOADS = ["columns", "shared", "grid"]


def random_weight(
    payload: str, rows: int, columns: int, widths: tuple[int, ...], share: float
) -> ColumnPayload:
    """A matrix whose columns take turns in their width; `share` of its entries are reserved."""
    torch.manual_seed(rows * columns)
    column_bits = torch.tensor([widths[i % len(widths)] for i in range(columns)]).to(torch.uint8)
    codes = (torch.rand(rows, columns) * 2.0**column_bits).to(torch.uint8)
    taken = torch.rand(rows, columns) < share
    codes[taken] = 0
    places = torch.nonzero(taken.t())
    counts = taken.sum(0)
    reserved = Reserved(counts, places[:, 1], torch.randn(len(places)).half())
    coded = codes, column_bits, reserved
    if payload == "grid":
        groups, width = -(-columns // 5), int(column_bits[0])
        zeros = torch.randint(2**width, (rows, groups)).to(torch.uint8)
        return RowGrid(*coded, torch.rand(rows, groups).half(), zeros, 5)
    if payload == "shared":
        books = {width: torch.randn(2**width).half() for width in set(column_bits.tolist())}
        return SharedCodebooks(
            *coded, books, torch.rand(columns, 2).half(), torch.rand(rows).half()
        )
    values = torch.randn(columns, 2 ** int(column_bits.max())).half()
    used = torch.arange(values.shape[1]) < 2 ** column_bits[:, None].int()
    return ColumnCodebooks(*coded, values * used)


def stored(weight: ColumnPayload, folder: Path) -> ColumnPayload:
    save_units(folder, [Unit({f"x.{s}": t for s, t in weight.pack().items()})], 10**9)
    layout = weight.layout()
    with open_tensors(folder) as get:
        return unpack_weight(layout, {s: get(f"x.{s}") for s in layout.stored_tensors()})


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_matrix_of_one_width_comes_back(width, shape, payload, share, tmp_path):
    weight = random_weight(payload, *shape, (width,), share)
    found = stored(weight, tmp_path)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.dequantize(), weight.dequantize())
    spans = read_spans(tmp_path)["model.safetensors"].values()
    assert weight.ledger().total == 8 * sum(span.end - span.start for span in spans)


@pytest.mark.parametrize("payload", ["columns", "shared"])
@pytest.mark.parametrize("shape", [(1, 576), (49, 31), (7, 576)], ids=str)
def test_a_matrix_of_many_widths_comes_back(shape, payload, tmp_path):
    weight = random_weight(payload, *shape, WIDTHS, 0.1)
    found = stored(weight, tmp_path)
    assert torch.equal(found.column_bits, weight.column_bits)
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.case(66)
@pytest.mark.parametrize(
    ("payload", "suffix"),
    [
        ("columns", "codes_3"),
        ("columns", "column_bits"),
        ("columns", "reserved_rows"),
        ("columns", "reserved_counts"),
        ("grid", "zeros"),
    ],
)
def test_a_padding_bit_that_is_set_is_refused(payload, suffix):
    widths = (3,) if payload == "grid" else (3, 2)
    weight = random_weight(payload, 49, 31, widths, 0.1)
    tensors = weight.pack()
    tensors[suffix] = tensors[suffix].clone()
    tensors[suffix].view(-1)[-1] |= 128
    with pytest.raises(CheckpointError, match=f"{suffix} has padding bits"):
        unpack_weight(weight.layout(), tensors)


@pytest.mark.case(66)
@pytest.mark.parametrize("read", [unpack_weight, operand_of])
@pytest.mark.parametrize("entry", [0, 7, -1])
@pytest.mark.parametrize(("payload", "widths"), [("columns", (3, 2)), ("grid", (5,))])
def test_a_reserved_entry_with_a_code_is_refused(payload, widths, entry, read):
    weight = random_weight(payload, 49, 31, widths, 0.1)
    read(weight.layout(), weight.pack())
    weight.codes[weight.reserved.rows[entry], weight.reserved.columns()[entry]] = 1
    with pytest.raises(CheckpointError, match="code other than 0"):
        read(weight.layout(), weight.pack())


@pytest.mark.case(66)
def test_an_entry_that_is_reserved_twice_is_refused():
    weight = random_weight("columns", 49, 31, (3,), 0.1)
    weight.reserved.rows[1] = weight.reserved.rows[0]
    with pytest.raises(CheckpointError, match="do not ascend"):
        unpack_weight(weight.layout(), weight.pack())
