"""Rows that are decoded by themselves are those of the whole matrix, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from payload_samples import ROWS, SAMPLES
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.payload import ColumnCodebooks, RowGrid, operand_of, rows_of
from claq_exp.payload.base import Payload
from claq_exp.payload.columns import Reserved
from claq_exp.payload.gather import gathered

every_sample = pytest.mark.parametrize("payload", SAMPLES.values(), ids=SAMPLES)
ASKED = torch.tensor([5, 0, ROWS - 1, 5, 7, 7, 2])


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.contiguous().view(torch.int32), second.contiguous().view(torch.int32)
    )


@every_sample
@pytest.mark.parametrize("index", [ASKED, torch.arange(ROWS), ASKED[:0]], ids=["some", "all", "no"])
def test_rows_are_those_of_the_whole_matrix(payload, index):
    found = rows_of(payload.layout(), payload.pack(), index)
    assert found.shape == (len(index), payload.shape[1])
    assert same_bits(found, payload.dequantize()[index])


@every_sample
def test_a_form_without_a_reader_of_its_own_unpacks_the_whole(payload):
    found = Payload.rows.__func__(type(payload), payload.layout(), payload.pack(), ASKED)
    assert same_bits(found, payload.dequantize()[ASKED])


@every_sample
@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_that_is_not_there_is_refused(payload, row):
    with pytest.raises(IndexError, match=str(ROWS)):
        rows_of(payload.layout(), payload.pack(), torch.tensor([0, row]))


@every_sample
def test_damaged_tensors_are_refused(payload):
    tensors = payload.pack()
    tensors.pop(next(name for name in tensors if name.startswith("codes_")))
    with pytest.raises(CheckpointError):
        rows_of(payload.layout(), tensors, ASKED)


def exact(payload: Payload, index: Tensor) -> Tensor:
    """What the format says of each row in float64, from the bits of the stored codes."""
    tensors, bits = payload.pack(), payload.column_bits.tolist()
    widths = sorted(set(bits))
    lines = {width: iter(tensors[f"codes_{width}"]) for width in widths}
    found = torch.zeros(len(index), len(bits), dtype=torch.float64)
    for column, width in enumerate(bits):
        stream = int.from_bytes(bytes(next(lines[width]).tolist()), "little")
        for place, row in enumerate(index.tolist()):
            code = stream >> (row * width) & (2**width - 1)
            if isinstance(payload, RowGrid):
                group = column // payload.group_size
                step = code - int(payload.zeros[row, group])
                found[place, column] = float(payload.scales[row, group]) * step
            else:
                found[place, column] = float(payload.values[column, code])
    kept = zip(*(part.tolist() for part in reserved_places(payload.reserved)), strict=True)
    for row, column, value in kept:
        found[index == row, column] = value
    return found


def reserved_places(reserved: Reserved) -> tuple[Tensor, Tensor, Tensor]:
    return reserved.rows, reserved.columns(), reserved.values.double()


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    dice = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    grid = draw(st.booleans())
    widths = [draw(st.integers(1, 8)) for _ in range(1 if grid else columns)] * columns
    bits = torch.tensor(widths[:columns], dtype=torch.uint8)
    codes = (torch.rand(rows, columns, generator=dice) * 2.0 ** bits.float()).to(torch.uint8)
    chosen = torch.rand(columns, rows, generator=dice) < draw(st.sampled_from([0.0, 0.2]))
    owners, places = chosen.nonzero(as_tuple=True)
    codes[places, owners] = 0
    values = torch.randn(len(places), generator=dice).half()
    coded = codes, bits, Reserved(chosen.sum(1), places, values)
    if grid:
        size = draw(st.integers(1, columns))
        groups = -(-columns // size)
        zeros = torch.randint(2 ** int(bits[0]), (rows, groups), generator=dice).to(torch.uint8)
        scales = torch.rand(rows, groups, generator=dice).half() + 0.1
        return RowGrid(*coded, scales, zeros, size)
    books = torch.randn(columns, 2 ** int(bits.max()), generator=dice).half()
    books[torch.arange(books.shape[1]) >= 2 ** bits[:, None].int()] = 0
    return ColumnCodebooks(*coded, books)


@given(payloads(), st.lists(st.integers(0, 10**6), max_size=12))
def test_any_rows_of_any_shape_follow_from_the_stored_bits(payload, numbers):
    index = torch.tensor([number % payload.shape[0] for number in numbers], dtype=torch.int64)
    found = gathered(operand_of(payload.layout(), payload.pack()), index)
    assert torch.equal(found, exact(payload, index).float())
    assert same_bits(found, payload.dequantize()[index])
