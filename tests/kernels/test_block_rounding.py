"""Rounding to a block format on a GPU is, bit for bit, that on a CPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import claq_exp.number_formats
from claq_exp.number_formats import block_rounding
from claq_exp.number_formats.block_rounding import _TABLES, round_on_gpu
from claq_exp.number_formats.encoding import array_maxima
from claq_exp.number_formats.formats import BlockFormat
from claq_exp.number_formats.search import _gpu_kernel, round_numbers
from claq_exp.number_formats.table import FormatCodebooks

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def learned(codebooks: int, block: int, array: int) -> FormatCodebooks:
    """A grid of random codebooks of 16 integers of 6 bits, the first two the same."""
    generator = torch.Generator().manual_seed(codebooks)
    books = [torch.randperm(63, generator=generator)[:16].sort().values for _ in range(codebooks)]
    books[1:2] = books[:1] * (codebooks > 1)
    block_format = BlockFormat(4, array, "e4m3", "learned", block, codebooks, 6)
    return FormatCodebooks(block_format, torch.stack(books).float() - 31)


def fixed(bits: int, array: int, scale: str, codewords: str) -> FormatCodebooks:
    return FormatCodebooks.fixed(BlockFormat(bits, array, scale, codewords))


GRIDS = {
    "1 codebook": learned(1, 8, 64),
    "2 codebooks": learned(2, 8, 64),
    "5 codebooks": learned(5, 4, 16),
    "8 codebooks": learned(8, 8, 64),
    "16 codebooks": learned(16, 8, 64),
    "blocks of 1": learned(2, 1, 8),
    "blocks of 12": learned(4, 12, 24),
    "blocks of 128": learned(2, 128, 128),
    "e2m1": fixed(4, 16, "e4m3", "e2m1"),
    "mxfp4": fixed(4, 32, "e8m0", "e2m1"),
    "integer": fixed(4, 128, "float16", "integer"),
    "odd arrays": fixed(4, 9, "float16", "integer"),
    "whole rows": fixed(8, 0, "outer", "integer"),
}


def numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Heavy tails, numbers on thresholds, arrays of zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(rows, columns, generator=generator) ** 3
    values[1] = torch.randint(-62, 63, (columns,), generator=generator) / 2
    values[1, 0] = 31.0
    values[2, : columns // 2] = 0.0
    values[3] = 0.0
    return values.to(dtype)


def steps_of(values: Tensor, grid: FormatCodebooks) -> Tensor:
    maxima = array_maxima(values, grid.format.array)
    outer = maxima.amax(dim=1, keepdim=True)
    rule, top = grid.format.rule, grid.format.top
    return rule.read(rule.find(maxima, outer, top), outer, top)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    whole = BITS[expected.dtype]
    return found.dtype == expected.dtype and torch.equal(found.view(whole), expected.view(whole))


def cut_to_bfloat16(values: Tensor) -> Tensor:
    """What Triton's interpreter makes of a float32, where a GPU rounds to the nearest bfloat16."""
    return (values.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("columns", [128, 301])
def test_every_bit_is_that_of_the_cpu(device, name, columns):
    grid, values = GRIDS[name], numbers(6, columns, torch.float32)
    steps = steps_of(values, grid)
    found = values.to(device, copy=True)
    round_on_gpu(found, steps.to(device), grid)
    values = round_numbers(values, steps, grid)
    assert same_bits(found.cpu(), values)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["8 codebooks", "e2m1", "whole rows"])
def test_the_result_has_the_type_of_the_values_and_leaves_them_alone(device, name, dtype):
    grid, values = GRIDS[name], numbers(5, 200, dtype)
    steps, source = steps_of(values, grid), values.to(device)
    found = torch.empty_like(source)
    round_on_gpu(source, steps.to(device), grid, found)
    assert same_bits(source.cpu(), values)
    if dtype == torch.bfloat16 and device == "cpu":
        expected = cut_to_bfloat16(round_numbers(values.float(), steps, grid))
    else:
        expected = round_numbers(values, steps, grid)
    assert same_bits(found.cpu(), expected)


@pytest.mark.parametrize("name", ["5 codebooks", "e2m1"])
def test_what_is_no_number_stays_none_and_others_are_as_ever(device, name):
    grid, values = GRIDS[name], numbers(4, 64, torch.float32)
    steps = steps_of(values, grid)
    spoiled = values.to(device, copy=True)
    spoiled[0, 3] = torch.nan
    round_on_gpu(spoiled, steps.to(device), grid)
    values = round_numbers(values, steps, grid)
    assert spoiled.isnan().nonzero().tolist() == [[0, 3]]
    assert same_bits(spoiled.cpu()[:, 16:], values[:, 16:])
    assert bool(spoiled.isfinite().sum() == spoiled.numel() - 1)


def test_numbers_beyond_the_largest_codeword_are_cut(device):
    grid, values = GRIDS["8 codebooks"], numbers(4, 64, torch.float32) * 1e30
    steps = torch.full((4, 1), 1e-9)
    found = values.to(device, copy=True)
    round_on_gpu(found, steps.to(device), grid)
    values = round_numbers(values, steps, grid)
    assert same_bits(found.cpu(), values)


def test_the_least_numbers_are_not_taken_for_zero(device):
    grid = FormatCodebooks(
        BlockFormat(1, 4, "outer", "learned", 4, 1, 2), torch.tensor([[-1.0, 1.0]])
    )
    values = torch.tensor([[1.0, -1e-45, 1e-45, 0.0]], device=device)
    round_on_gpu(values, torch.ones(1, 1, device=device), grid)
    assert values.tolist() == [[1.0, -1.0, 1.0, 1.0]]


def test_without_triton_torch_searches(monkeypatch):
    assert _gpu_kernel.__wrapped__() is block_rounding
    monkeypatch.delattr(claq_exp.number_formats, "block_rounding")
    monkeypatch.setitem(sys.modules, block_rounding.__name__, None)
    assert _gpu_kernel.__wrapped__() is None


def test_more_blocks_than_a_launch_can_count_are_several_launches(device, monkeypatch):
    monkeypatch.setattr(block_rounding, "MOST_BLOCKS", 20)
    test_every_bit_is_that_of_the_cpu(device, "2 codebooks", 64)


def test_the_table_on_a_device_lives_as_long_as_its_grid(device):
    grid, values = learned(2, 8, 64), numbers(4, 64, torch.float32).to(device)
    key = id(grid)
    for _ in range(2):
        round_on_gpu(values, torch.ones(4, 1, device=device), grid)
        (copy,) = _TABLES[key].values()
    assert copy.device == values.device
    del grid
    assert key not in _TABLES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GRIDS)
def test_many_numbers_on_a_gpu(name, dtype):
    grid, values = GRIDS[name], numbers(500, 4097, dtype)
    steps = steps_of(values, grid)
    found = round_numbers(values.cuda(), steps.cuda(), grid)
    assert same_bits(found.cpu(), round_numbers(values, steps, grid))
