"""Bit packing, the stored form of a matrix, and the ledger that prices it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from claq_exp.errors import CheckpointError
from claq_exp.payload import (
    ColumnCodebooks,
    RowGrid,
    SharedCodebooks,
    packing,
    read_layout,
    unpack_weight,
)
from claq_exp.payload.column_codebooks import ColumnCodebooksLayout
from claq_exp.payload.columns import ColumnPayload, Reserved
from claq_exp.payload.packing import pack, unpack, unpack_some
from claq_exp.payload.row_grid import RowGridLayout
from claq_exp.payload.shared_codebooks import SharedCodebooksLayout
from claq_exp.payload.stored import Ledger, index_width, packed_bytes

QUICK = settings(max_examples=60)
seeds = st.integers(0, 2**32 - 1)


def random_reserved(generator: np.random.Generator, rows: int, columns: int) -> Reserved:
    counts = generator.integers(0, rows + 1, columns)
    chosen = [np.sort(generator.choice(rows, count, replace=False)) for count in counts]
    return Reserved(
        counts=torch.from_numpy(counts),
        rows=torch.from_numpy(np.concatenate(chosen)),
        values=torch.from_numpy(generator.normal(size=counts.sum()).astype(np.float16)),
    )


def random_weight(
    seed: int,
    rows: int,
    columns: int,
    widths: list[int],
    *,
    grid: bool = False,
    reserve: bool = False,
    shared: bool = False,
    row_scaled: bool = False,
) -> ColumnPayload:
    """A quantized matrix of random numbers; with `grid` of the first width alone."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(generator.normal(size=shape).astype(np.float16))

    bits = generator.choice(widths[:1] if grid else widths, columns)
    codes = generator.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    reserved = Reserved.none(columns)
    if reserve:
        reserved = random_reserved(generator, rows, columns)
        codes[reserved.rows, reserved.columns()] = 0
    coded = torch.from_numpy(codes), torch.from_numpy(bits.astype(np.uint8)), reserved
    if grid:
        group_size = int(generator.integers(1, columns + 1))
        shape = (rows, -(-columns // group_size))
        scales = torch.from_numpy(generator.uniform(0.01, 1, shape).astype(np.float16))
        zeros = torch.from_numpy(generator.integers(0, 2 ** bits[0], shape).astype(np.uint8))
        return RowGrid(*coded, scales, zeros, group_size)
    row_scales = None
    if row_scaled:
        row_scales = torch.from_numpy(generator.uniform(0.1, 9, rows).astype(np.float16))
    if shared:
        books = {width: normal(2**width).sort().values for width in np.unique(bits).tolist()}
        return SharedCodebooks(*coded, books, normal(columns, 2), row_scales)
    values = normal(columns, 2 ** bits.max())
    values[torch.arange(values.shape[1]) >= 2 ** torch.from_numpy(bits)[:, None]] = 0
    return ColumnCodebooks(*coded, values, row_scales)


weights = st.builds(
    random_weight,
    seed=seeds,
    rows=st.one_of(st.sampled_from([1, 2, 49, 64]), st.integers(1, 70)),
    columns=st.one_of(st.just(1), st.integers(1, 70)),
    widths=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
    grid=st.booleans(),
    reserve=st.booleans(),
    shared=st.booleans(),
    row_scaled=st.booleans(),
)


@pytest.mark.case(49)
@pytest.mark.parametrize("width", range(1, 17))
@settings(max_examples=15)
@given(rows=st.integers(1, 70), count=st.sampled_from([1, 2, 7, 8, 9, 49, 70]), seed=seeds)
def test_packed_integers_come_back_and_stand_least_significant_bit_first(width, rows, count, seed):
    values = np.random.default_rng(seed).integers(0, 2**width, (rows, count))
    packed = pack(torch.from_numpy(values), width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(count, width))
    whole = sum(int(value) << (index * width) for index, value in enumerate(values[0]))
    assert packed[0].numpy().tobytes() == whole.to_bytes(packed.shape[1], "little")
    assert unpack(packed, width, count).tolist() == values.tolist()
    lines, places = torch.arange(rows).repeat_interleave(count), torch.arange(count).repeat(rows)
    assert unpack_some(packed, width, lines, places).tolist() == values.reshape(-1).tolist()


@pytest.mark.parametrize("width", [17, 24, 31])
def test_the_largest_integer_of_a_wide_width_comes_back(width):
    values = torch.tensor([2**width - 1, 0, 1, 2 ** (width - 1)])
    assert unpack(pack(values, width), width, 4).tolist() == values.tolist()


def test_a_vector_packs_to_a_vector_and_leading_dimensions_stay():
    values = torch.arange(24).reshape(2, 3, 4)
    assert pack(values[0, 0], 5).shape == (3,)
    packed = pack(values, 5)
    assert packed.shape == (2, 3, 3)
    assert torch.equal(unpack(packed, 5, 4), values.int())


def test_work_in_chunks_changes_nothing(monkeypatch):
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 8, (23, 11)))
    whole = pack(values, 3)
    monkeypatch.setattr(packing, "CHUNK", 30)
    assert torch.equal(pack(values, 3), whole)
    assert torch.equal(unpack(whole, 3, 11), values.int())


@pytest.mark.case(45)
@QUICK
@given(weights)
def test_stored_tensors_are_what_the_layout_says_and_the_ledger_counts_every_byte(weight):
    layout = weight.layout()
    tensors = weight.pack()
    described = layout.stored_tensors()
    assert set(tensors) == set(described)
    names = {"F16": torch.float16, "U8": torch.uint8}
    accounts = dict.fromkeys(Ledger().as_dict(), 0)
    for suffix, spec in described.items():
        tensor = tensors[suffix]
        assert tuple(tensor.shape) == spec.shape, suffix
        assert tensor.dtype == names[spec.dtype], suffix
        assert 8 * tensor.nbytes == spec.bits, suffix
        accounts[spec.account] += 8 * tensor.nbytes
    assert weight.ledger().as_dict() == accounts
    assert weight.ledger().total == 8 * sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.case(49)
@QUICK
@given(weights)
def test_a_weight_comes_back_bit_by_bit_from_safetensors(weight):
    layout = read_layout(weight.layout().to_json())
    assert layout == weight.layout()
    stored = load(save({name: tensor.contiguous() for name, tensor in weight.pack().items()}))
    again = unpack_weight(layout, stored)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.column_bits, weight.column_bits)
    assert torch.equal(again.reserved.counts, weight.reserved.counts)
    assert torch.equal(again.reserved.rows, weight.reserved.rows)
    assert torch.equal(again.reserved.values, weight.reserved.values)
    assert type(again) is type(weight)
    assert again.dequantize().numpy().tobytes() == weight.dequantize().numpy().tobytes()


def row_scale(weight: ColumnPayload, row: int) -> float:
    scales = weight.row_scales
    return 1.0 if scales is None else scales[row].item()


@QUICK
@given(weights)
def test_dequantized_entries_are_looked_up_one_by_one(weight):
    dense = weight.dequantize()
    kept = dict(
        zip(
            zip(weight.reserved.rows.tolist(), weight.reserved.columns().tolist(), strict=True),
            weight.reserved.values.tolist(),
            strict=True,
        )
    )
    generator = np.random.default_rng(0)
    rows, columns = dense.shape
    for _ in range(20):
        row, column = int(generator.integers(rows)), int(generator.integers(columns))
        code = int(weight.codes[row, column])
        if (row, column) in kept:
            expected = kept[row, column]
        elif isinstance(weight, ColumnCodebooks):
            expected = weight.values[column, code].item() * row_scale(weight, row)
        elif isinstance(weight, SharedCodebooks):
            scale, shift = weight.column_scales[column].tolist()
            book = weight.books[int(weight.column_bits[column])]
            expected = (scale * book[code].item() + shift) * row_scale(weight, row)
        else:
            group = column // weight.group_size
            zero = int(weight.zeros[row, group])
            expected = weight.scales[row, group].item() * (code - zero)
        assert dense[row, column].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_ledger_of_a_hand_counted_matrix():
    layout = ColumnCodebooksLayout(
        rows=49,
        columns=10,
        columns_per_width={2: 7, 4: 3},
        reserved=9,
        most_reserved=5,
    )
    assert layout.ledger() == Ledger(
        codes=8 * (7 * 13 + 3 * 25),  # ceil(49 * 2 / 8) and ceil(49 * 4 / 8) bytes a column
        codebooks=16 * (7 * 4 + 3 * 16),
        column_bits=8 * 2,  # one bit a column: which of two widths
        reserved_values=16 * 9,
        reserved_positions=8 * (7 + 4),  # 9 rows of 6 bits, 10 counts of 3 bits
    )
    mean = (7 * 2 + 3 * 4) / 10
    assert layout.nominal_bits() == pytest.approx(mean + 9 / 490 * (16 - mean))


def test_the_ledger_of_a_hand_counted_grid():
    layout = RowGridLayout(rows=6, columns=10, columns_per_width={3: 10}, group_size=4)
    assert layout.ledger() == Ledger(
        codes=8 * 10 * 3,  # ceil(6 * 3 / 8) bytes a column
        scales=16 * 6 * 3 + 8 * 7,  # 18 scales, and 18 zero points of 3 bits
    )
    assert layout.nominal_bits() == 3


def test_the_ledger_of_hand_counted_shared_codebooks_and_row_scales():
    layout = SharedCodebooksLayout(
        rows=49, columns=10, columns_per_width={2: 7, 4: 3}, row_scaled=True
    )
    assert layout.ledger() == Ledger(
        codes=8 * (7 * 13 + 3 * 25),
        codebooks=16 * (4 + 16),  # one of each width
        column_bits=8 * 2,
        scales=16 * 2 * 10 + 16 * 49,  # scale and shift of a column, scale of a row
    )
    assert layout.nominal_bits() == pytest.approx(2.6)


def test_ledgers_add_up_account_by_account():
    total = Ledger.sum([Ledger(codes=1, other=2), Ledger(codes=10, unquantized=5)])
    assert total == Ledger(codes=11, other=2, unquantized=5)
    assert total.total == 18
    assert Ledger.sum([]).total == 0


@pytest.mark.parametrize(("count", "width"), [(1, 0), (2, 1), (3, 2), (4, 2), (49, 6), (256, 8)])
def test_index_width_is_the_least_that_tells_all_apart(count, width):
    assert index_width(count) == width


MIXED = random_weight(1, rows=49, columns=12, widths=[2, 4], grid=False, reserve=True)
GRID = random_weight(2, rows=9, columns=10, widths=[3], grid=True, reserve=False)
SHARED = random_weight(3, rows=49, columns=12, widths=[2, 4], shared=True, row_scaled=True)
EXAMPLES = {"codebooks": MIXED, "grid": GRID, "shared": SHARED}


def test_the_examples_below_hold_every_suffix():
    assert {
        suffix.rstrip("_1234567890") for example in EXAMPLES.values() for suffix in example.pack()
    } == {
        "codes",
        "codebooks",
        "column_bits",
        "reserved_values",
        "reserved_rows",
        "reserved_counts",
        "scales",
        "zeros",
        "column_scales",
        "row_scales",
    }


@pytest.mark.case(66)
@pytest.mark.parametrize("weight", EXAMPLES.values(), ids=EXAMPLES)
def test_a_missing_extra_or_misshapen_tensor_is_refused_by_name(weight):
    layout, tensors = weight.layout(), weight.pack()
    for suffix, tensor in tensors.items():
        without = {name: other for name, other in tensors.items() if name != suffix}
        with pytest.raises(CheckpointError, match=suffix):
            unpack_weight(layout, without)
        with pytest.raises(CheckpointError, match=suffix):
            unpack_weight(layout, {**tensors, suffix: tensor[:-1]})
        with pytest.raises(CheckpointError, match=suffix):
            unpack_weight(layout, {**tensors, suffix: tensor.to(torch.int32)})
        if tensor.dtype == torch.float16:
            for bad in (float("nan"), float("inf")):
                broken = tensor.clone()
                broken.view(-1)[-1] = bad
                with pytest.raises(CheckpointError, match=suffix):
                    unpack_weight(layout, {**tensors, suffix: broken})
    with pytest.raises(CheckpointError, match="surplus"):
        unpack_weight(layout, {**tensors, "surplus": torch.zeros(1)})


def test_a_reserved_row_outside_the_matrix_is_refused():
    rows = MIXED.reserved.rows.clone()
    rows[3] = 49
    tampered = {**MIXED.pack(), "reserved_rows": pack(rows, 6)}
    with pytest.raises(CheckpointError, match="reserved"):
        unpack_weight(MIXED.layout(), tampered)


def test_reserved_counts_that_do_not_add_up_are_refused():
    counts = MIXED.reserved.counts.clone()
    counts[counts.argmax()] -= 1
    tampered = {**MIXED.pack(), "reserved_counts": pack(counts, 6)}
    with pytest.raises(CheckpointError, match="reserved"):
        unpack_weight(MIXED.layout(), tampered)


@pytest.mark.case(66)
def test_column_bits_that_contradict_the_layout_are_refused():
    position = (MIXED.column_bits == 4).long()
    position[0] = 1 - position[0]
    with pytest.raises(CheckpointError, match="column_bits"):
        unpack_weight(MIXED.layout(), {**MIXED.pack(), "column_bits": pack(position, 1)})


@pytest.mark.parametrize("weight", EXAMPLES.values(), ids=EXAMPLES)
def test_a_changed_layout_is_refused_or_still_describes_a_whole_matrix(weight):
    escaped = []
    for field in weight.layout().to_json():
        for value in (None, "3", "x", -1, 0, 1, 2, 5, 12.5, 1e12, [], {}, True):
            data = {**weight.layout().to_json(), field: value}
            try:
                again = unpack_weight(read_layout(data), weight.pack()).dequantize()
            except CheckpointError:
                continue
            except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
                escaped.append(f"{field}={value!r}: {type(error).__name__}: {error}")
                continue
            assert again.shape == weight.codes.shape
    assert not escaped, "\n".join(escaped)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "galaxy"},
        {"kind": ["galaxy"]},
        {"columns_per_width": {"2": 7, "9": 5}},
        {"columns_per_width": {"0": 7, "4": 5}},
        {"columns_per_width": {"two": 12}},
        {"columns_per_width": {"2": 11}},
        {"surplus": 1},
        {"row_scaled": "yes"},
        {"row_scaled": None},
        {"kind": "row_grid"},
        {"kind": "row_grid", "group_size": 4},
    ],
    ids=str,
)
def test_a_layout_that_means_nothing_is_refused(changes):
    with pytest.raises(CheckpointError):
        read_layout({**MIXED.layout().to_json(), **changes})


@pytest.mark.parametrize("name", ["codebooks", "shared"])
def test_a_flag_or_kind_that_contradicts_the_tensors_is_refused(name):
    data, tensors = EXAMPLES[name].layout().to_json(), EXAMPLES[name].pack()
    other = {"codebooks": "shared_codebooks", "shared": "column_codebooks"}[name]
    for changes in ({"row_scaled": not data["row_scaled"]}, {"kind": other}):
        with pytest.raises(CheckpointError):
            unpack_weight(read_layout({**data, **changes}), tensors)


@pytest.mark.parametrize("weight", EXAMPLES.values(), ids=EXAMPLES)
def test_a_layout_has_the_keys_of_its_kind_and_no_others(weight):
    data = weight.layout().to_json()
    assert read_layout(data) == weight.layout()
    for key in data:
        with pytest.raises(CheckpointError):
            read_layout({name: value for name, value in data.items() if name != key})
    with pytest.raises(CheckpointError):
        read_layout([])
