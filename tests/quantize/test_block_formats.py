"""Block formats: scales, codewords, and the way to codes and back."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.number_formats.encoding import decode, encode, round_values
from claq_exp.number_formats.formats import E2M1, INTEGER, LEARNED, BlockFormat
from claq_exp.number_formats.levels import encode_weight
from claq_exp.number_formats.scales import SCALES, to_e4m3
from claq_exp.number_formats.search import search_in_torch
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.number_formats.universal import read_codebooks
from claq_exp.payload import BlockCodes, unpack_weight
from claq_exp.quantize.activation import ACTIVATION

NARROW = [-12, -10, -8, -7, -5, -4, -2, -1, 1, 2, 3, 5, 7, 9, 11, 13]
WIDE = [-31, -28, -22, -16, -12, -8, -5, -1, 2, 5, 8, 12, 16, 22, 28, 31]
VECTOR = [
    [0.50, -0.25, 0.125, -1, 0.75, 0, -0.375, 0.0625],
    [0.03, -0.02, 0.31, 0.17, -0.09, 0.22, -0.28, 0.11],
    [2, -1.5, 0.4, 0.3, -0.2, 0.1, 1.1, -0.7],
    [0.9, -0.8, 0.05, -0.6, 0.33, 1.9, -1.2, 0],
]


def lo_bcq(array=64, codebooks=8, *, scale="e4m3", block=8, bits=4, codeword_bits=6):
    return BlockFormat(bits, array, scale, LEARNED, block, codebooks, codeword_bits)


def universal(array=64, codebooks=8, **changes):
    block_format = lo_bcq(array, codebooks, **changes)
    return FormatCodebooks(block_format, read_codebooks("universal", block_format))


def drawn_books(codebooks, seed=0, top=31):
    generator = torch.Generator().manual_seed(seed)
    books = torch.randint(-top, top + 1, (codebooks, 16), generator=generator)
    return books.float().sort(dim=1).values


GRIDS = {
    "lo_bcq 64/8": universal(),
    "lo_bcq 128/16": universal(128, 16),
    "lo_bcq inverse": universal(scale="e4m3_inverse"),
    "lo_bcq INT8": universal(codeword_bits=8),
    "lo_bcq blocks of 4": FormatCodebooks(lo_bcq(32, 3, block=4), drawn_books(3)),
    "lo_bcq one codebook": FormatCodebooks(lo_bcq(64, 1), drawn_books(1)),
    "mxfp4": FormatCodebooks.fixed(BlockFormat(4, 32, "e8m0", E2M1)),
    "nvfp4": FormatCodebooks.fixed(BlockFormat(4, 16, "e4m3", E2M1)),
    "vsq": FormatCodebooks.fixed(BlockFormat(4, 16, "integer", INTEGER)),
    "bfp": FormatCodebooks.fixed(BlockFormat(4, 16, "e8m0", INTEGER)),
    "int4 token": FormatCodebooks.fixed(BlockFormat(4, 0, "outer", INTEGER)),
    "int8 group": FormatCodebooks.fixed(BlockFormat(8, 128, "float16", INTEGER)),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def numbers(rows=6, columns=328, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return values * torch.randn(1, columns, generator=generator).exp()


def nearest_numbers(values, grid, limit):
    """Slow float64 reference: an array's scale, then for each codebook the nearest codewords.

    Returns for each block of each row the smallest squared error over codebooks, in steps.
    """
    block_format = grid.format
    books = grid.codebooks.double().numpy()
    array = block_format.array or values.shape[1]
    block = block_format.block or array
    errors = []
    for row, outer in zip(values.double().numpy(), limit.double().numpy(), strict=True):
        for start in range(0, len(row), array):
            part = row[start : start + array]
            step = exact_step(block_format, np.abs(part).max(), outer[0])
            for first in range(0, len(part), block):
                scaled = part[first : first + block] / step if step else part[:0]
                misses = np.abs(scaled[:, None, None] - books).min(axis=2)
                errors.append((misses**2).sum(axis=0).min() if len(scaled) else 0.0)
    return np.array(errors)


def exact_e4m3(value):
    """The closed form: steps of 2**(e - 3), e from -6, ties to even."""
    if value == 0:
        return 0.0
    size = min(abs(value), 448.0)
    exponent = max(math.floor(math.log2(size)), -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(round(size / step) * step, value)


def exact_step(block_format, largest, outer):
    """What codewords are multiplied by, each scale rule by its formula."""
    if largest == 0 or outer == 0:
        return 0.0
    single, top = np.float32, block_format.top
    quotient = single(largest) / single(top)
    units = {"e4m3": single(outer) / single(top * 448), "integer": single(outer) / single(top)}
    units["integer"] /= single(255)
    rules = {
        "e4m3": lambda unit: max(exact_e4m3(quotient / unit), 2.0**-9) * unit,
        "e4m3_inverse": lambda _: outer / (top * exact_e4m3(single(outer) / single(largest))),
        "e8m0": lambda _: 2.0 ** (math.floor(math.log2(largest)) - math.floor(math.log2(top))),
        "integer": lambda unit: round(float(quotient / unit)) * unit,
        "float16": lambda _: float(np.float16(quotient)),
        "outer": lambda _: outer / top,
    }
    return rules[block_format.scale](units.get(block_format.scale))


def test_e4m3_is_its_closed_form_for_every_bfloat16():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    values = values[values.abs() <= 448]
    expected = torch.tensor([exact_e4m3(value) for value in values.tolist()])
    assert torch.equal(to_e4m3(values).float(), expected)
    library = values.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(to_e4m3(values).float().numpy(), library)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (2.0**-10, 0.0),
        (0.0015, 0.001953125),
        (0.0029296875, 0.00390625),
        (1.0625, 1.0),
        (1.0626, 1.125),
        (1.1875, 1.25),
        (17.0, 16.0),
        (17.5, 18.0),
        (100.0, 96.0),
        (1e4, 448.0),
        (-1e4, -448.0),
    ],
)
def test_e4m3_at_single_points(value, rounded):
    assert to_e4m3(torch.tensor(value)).float().item() == rounded


@pytest.mark.parametrize(
    ("largest", "inverse", "direct"),
    [
        (0.7, 0.023460411, 0.023041476),
        (0.64, 0.021505376, 0.020737328),
        (0.55, 0.017204301, 0.017281106),
        (0.004, 1.4400922e-4, 1.2600806e-4),
        (0.002, 1.4400922e-4, 6.300403e-5),
    ],
)
def test_scales_of_an_array_below_a_maximum_of_two(largest, inverse, direct):
    maxima, limit = torch.tensor([[largest]]), torch.tensor([[2.0]])
    for name, expected in (("e4m3_inverse", inverse), ("e4m3", direct)):
        rule = SCALES[name]
        step = rule.read(rule.find(maxima, limit, 31.0), limit, 31.0)
        assert step.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", ["e4m3", "e4m3_inverse"])
def test_the_worked_example(scale):
    grid = FormatCodebooks(
        lo_bcq(16, 2, scale=scale), torch.tensor([NARROW, WIDE], dtype=torch.float32)
    )
    values = torch.tensor(VECTOR).reshape(2, 16)
    encoded = encode(values, grid)
    assert encoded.selectors is not None
    assert encoded.selectors.tolist() == [[1, 0], [1, 1]]
    assert encoded.codes.tolist() == [
        [12, 5, 9, 0, 13, 7, 4, 8, 8, 7, 13, 11, 6, 12, 2, 10],
        [15, 2, 9, 9, 6, 8, 12, 4, 11, 4, 8, 5, 9, 14, 3, 7],
    ]
    rounded = decode(encoded, grid)
    first = [0.516129, -0.258065, 0.16129, -1, 0.709677, -0.032258, -0.387097, 0.064516]
    assert rounded[0, :8].tolist() == pytest.approx(first, abs=1e-6)
    error = (values - rounded).square().sum() / values.square().sum()
    assert error.item() == pytest.approx(0.00663247, rel=1e-5)


@every_grid
def test_every_block_has_the_smallest_error_that_any_codebook_gives(grid):
    values = numbers(4)
    encoded = encode(values, grid, by_row=True)
    limit = encoded.limit
    smallest = nearest_numbers(values, grid, limit)
    steps = encoded.steps(grid)
    array = grid.format.array or values.shape[1]
    block = grid.format.block or array
    found = []
    rounded = decode(encoded, grid)
    for row in range(len(values)):
        for start in range(0, values.shape[1], array):
            stop = min(start + array, values.shape[1])
            for first in range(start, stop, block):
                part = slice(first, min(first + block, stop))
                miss = (values[row, part] - rounded[row, part]).double() / steps[
                    row, start // array
                ]
                found.append(float(miss.square().sum()))
    assert np.allclose(found, smallest, rtol=1e-4, atol=1e-6)


@every_grid
def test_the_compiled_search_finds_what_the_search_in_torch_finds(grid):
    values = numbers(40, 328, seed=1)
    values[3, :64] = 0.0
    encoded = encode(values, grid, by_row=True)
    codes, selectors = search_in_torch(values, encoded.steps(grid), grid)
    assert torch.equal(codes, encoded.codes)
    if selectors is not None:
        assert torch.equal(selectors, encoded.selectors)
    assert torch.equal(round_values(values, grid), decode(encoded, grid))


@given(
    name=st.sampled_from(sorted(GRIDS)),
    values=arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 150)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
)
@settings(max_examples=150)
def test_any_finite_numbers_come_out_finite_of_their_size_and_alike(name, values):
    grid, numbers_ = GRIDS[name], torch.from_numpy(values)
    rounded = round_values(numbers_, grid)
    assert torch.isfinite(rounded).all()
    largest = numbers_.abs().amax(dim=1, keepdim=True)
    assert (rounded.abs() <= 2 * largest + 1e-7).all()  # scales and codes are rounded
    encoded = encode(numbers_, grid, by_row=True)
    codes, selectors = search_in_torch(numbers_, encoded.steps(grid), grid)
    assert torch.equal(codes, encoded.codes)
    assert selectors is None or torch.equal(selectors, encoded.selectors)
    assert torch.equal(decode(encoded, grid), rounded)


@pytest.mark.parametrize("codeword_bits", [4, 6, 8])
def test_the_table_finds_the_nearest_codeword_on_and_beyond_every_threshold(codeword_bits):
    top = 2 ** (codeword_bits - 1) - 1
    books = drawn_books(5, seed=2, top=top)
    table = FormatCodebooks(lo_bcq(64, 5, codeword_bits=codeword_bits), books).table
    scaled = torch.arange(-4 * (top + 3), 4 * (top + 3) + 1) / 4.0
    scaled = torch.cat([scaled, torch.tensor([1e9, -1e9, 1e-9, -1e-9])])
    for book in range(5):
        thresholds = (books[book, 1:] + books[book, :-1]) / 2
        expected = books[book][torch.bucketize(scaled, thresholds, right=True)]
        assert torch.equal(table.codewords[table.places(scaled), book], expected)


@pytest.mark.parametrize(
    ("values", "rounded"),
    [
        ([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], [0, 1, 1, 2, 2, 4, 4, 6]),
        ([-0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 6.0], [0, -1, -1, -2, -2, -4, -4, 6]),
        ([0.26, 0.74, 1.26, 1.74, 2.6, 3.6, 5.1, 7.9], [0.5, 0.5, 1.5, 1.5, 3, 4, 6, 6]),
    ],
)
def test_four_bit_floats_round_as_ieee_has_it(values, rounded):
    grid = FormatCodebooks.fixed(BlockFormat(4, 8, "e8m0", E2M1))
    assert round_values(torch.tensor([values]), grid).tolist() == [rounded]


def test_four_bit_floats_agree_with_ml_dtypes():
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(64, 32, generator=generator) * 12 - 6).to(torch.bfloat16).float()
    values[:, 0] = 6.0  # scales of 1
    grid = FormatCodebooks.fixed(BlockFormat(4, 32, "e8m0", E2M1))
    expected = values.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(round_values(values, grid).numpy(), expected)


@pytest.mark.parametrize("name", [name for name in GRIDS if GRIDS[name].format.scale != "float16"])
def test_numbers_scaled_by_a_power_of_two_round_alike(name):
    grid, values = GRIDS[name], numbers(5, 256, seed=3)
    for power in (-9, 3, 20):
        factor = 2.0**power
        assert torch.equal(round_values(values * factor, grid), round_values(values, grid) * factor)


@every_grid
def test_zeros_stay_zeros(grid):
    values = numbers(3, 256, seed=4)
    values[0], values[1, :128] = 0.0, 0.0
    rounded = round_values(values, grid)
    if grid.format.array:  # the array of a whole row is not zero
        assert (rounded[1, :128] == 0).all()
    assert (rounded[0] == 0).all()
    assert (round_values(torch.zeros(2, 64), grid) == 0).all()
    assert torch.isfinite(rounded).all()


@every_grid
def test_a_token_does_not_depend_on_the_others(grid):
    values = numbers(7, 256, seed=5)
    together = round_values(values, grid)
    assert torch.equal(torch.cat([round_values(row[None], grid) for row in values]), together)


def test_one_scale_for_all_tokens_does():
    values = numbers(7, 256, seed=5)
    values[0, 0] = 3000.0
    grid = GRIDS["int4 token"]
    alone = round_values(values[1:2], grid, by_row=False)
    assert not torch.equal(round_values(values, grid, by_row=False)[1:2], alone)


def test_a_known_limit_cuts_larger_numbers():
    values = torch.tensor([[8.0, 1.0, -8.0, 0.5]])
    rounded = round_values(values, GRIDS["int4 token"], limit=3.5)
    assert rounded.tolist() == [[3.5, 1.0, -4.0, 0.5]]


def test_an_outlier_costs_the_other_arrays_less_when_scales_are_not_inverse():
    values = numbers(64, 64, seed=6) / 4
    values[0, 0] = 3000.0
    errors = [
        (values - round_values(values, universal(scale=scale), by_row=False))[1:].square().mean()
        for scale in ("e4m3", "e4m3_inverse")
    ]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("name", ["lo_bcq 64/8", "lo_bcq 128/16", "nvfp4", "mxfp4", "vsq"])
def test_rounding_twice_changes_almost_nothing(name):
    once = round_values(numbers(16, 256, seed=7), GRIDS[name])
    twice = round_values(once, GRIDS[name])
    assert (twice - once).square().sum() / once.square().sum() < 1e-3


def test_one_more_codebook_makes_no_block_worse_and_the_same_one_changes_nothing():
    values, books = numbers(8, 256, seed=8), drawn_books(7, seed=1)
    before, selectors = None, None
    for count in range(1, 8):
        grid = FormatCodebooks(lo_bcq(64, count), books[:count])
        rounded = round_values(values, grid)
        errors = (values - rounded).square().reshape(-1, 8).sum(dim=1)
        if before is not None:
            assert (errors <= before * (1 + 1e-4) + 1e-9).all()
        before = errors
        again = FormatCodebooks(lo_bcq(64, count + 1), torch.cat([books[:count], books[:1]]))
        assert torch.equal(round_values(values, again), rounded)
        selectors = encode(values, again).selectors
        assert int(selectors.max()) < count  # of equals the first


def test_codebooks_closed_under_negation_are_odd():
    books = drawn_books(4, seed=3)
    grid = FormatCodebooks(lo_bcq(64, 8), torch.cat([books, -books.flip(1)]))
    values = numbers(8, 256, seed=9)
    assert torch.equal(round_values(-values, grid), -round_values(values, grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_type_and_the_shape_of_numbers_stay(dtype):
    values = numbers(6, 256).reshape(2, 3, 256).to(dtype)
    rounded = round_values(values, universal())
    assert rounded.dtype == dtype
    assert rounded.shape == values.shape
    assert round_values(values[:0], universal()).shape == (0, 3, 256)
    expected = round_values(values.float(), universal()).to(dtype)
    assert torch.equal(rounded, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_refused(bad):
    values = numbers(2, 64)
    values[1, 5] = bad
    with pytest.raises(NumericalError, match="not finite"):
        round_values(values, universal())


@pytest.mark.parametrize(
    ("block", "codebooks", "array", "bits"),
    [
        (8, 2, 128, 4.1875),
        (8, 8, 64, 4.5),
        (8, 16, 128, 4.5625),
        (8, 16, 64, 4.625),
        (8, 4, 16, 4.75),
        (4, 4, 32, 4.75),
        (2, 2, 16, 5.0),
    ],
)
def test_bits_are_those_of_the_formula(block, codebooks, array, bits):
    assert lo_bcq(array, codebooks, block=block).bits_per_number() == bits


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("mxfp4", {}, 4.25),
        ("nvfp4", {}, 4.5),
        ("vsq", {}, 4.5),
        ("bfp", {}, 4.5),
        ("lo_bcq", {}, 4.5),
        ("int", {"bits": 4, "group_size": 128}, 4.125),
        ("int", {"bits": 8}, 8.0),
    ],
)
def test_bits_of_activations(name, options, bits):
    assert ACTIVATION[name](**options).block_format().bits_per_number() == bits


@pytest.mark.parametrize(
    "grid", [grid for grid in GRIDS.values() if grid.format.rule.bits == 8 and grid.format.array]
)
@pytest.mark.parametrize("columns", [256, 328])
def test_a_packed_matrix_has_the_bits_of_the_formula_and_comes_back(grid, columns):
    weight = numbers(64, columns, seed=10)
    codes, levels = encode_weight(weight, grid)
    quantized = BlockCodes.of(codes, levels)
    tensors, layout = quantized.pack(), quantized.layout()
    stored = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert stored == layout.ledger().total
    own = 8 * tensors["block_codebooks"].numel() if "block_codebooks" in tensors else 0
    outer = 32 * (64 if grid.format.rule.by_row else 1) if grid.format.rule.outer else 0
    expected = grid.format.bits_per_number() * weight.numel() + own + outer
    if columns == 256:
        assert stored == expected
    else:  # the last array and the last byte of a row's selectors are not full
        assert expected < stored < 1.06 * expected
    again = unpack_weight(layout, tensors)
    assert isinstance(again, BlockCodes)
    assert torch.equal(again.dequantize(), quantized.dequantize())
    rounded = round_values(weight, grid, by_row=grid.format.rule.by_row)
    assert torch.equal(quantized.dequantize(), rounded)


def test_sixteen_codebooks_of_six_bits_take_192_bytes():
    matrix = BlockCodes.of(*encode_weight(numbers(8, 128), universal(64, 16)))
    assert matrix.pack()["block_codebooks"].numel() == 192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"array": 60}, "no multiple of block 8"),
        ({"codebooks": 17}, "codebooks is 17; give 1 to 16"),
        ({"codeword_bits": 9}, "codeword_bits is 9; give 4 to 8"),
        ({"scale": "e5m2"}, "scale 'e5m2' is not known"),
    ],
)
def test_a_format_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        lo_bcq(**options)


@pytest.mark.parametrize("name", ["nvfp4", "vsq", "lo_bcq", "int"])
def test_a_scope_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=r"activation\.scope 'layer' is not known"):
        ACTIVATION[name](scope="layer")
