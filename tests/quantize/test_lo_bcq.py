"""The design of codebooks: blocks and codebooks in turn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from claq_exp.errors import ConfigError
from claq_exp.number_formats.encoding import round_values
from claq_exp.number_formats.formats import E2M1, INTEGER, LEARNED, BlockFormat
from claq_exp.number_formats.lo_bcq import (
    STARTS,
    choose_codebooks,
    design_codebooks,
    fit_codebooks,
    normalized_blocks,
    start_again,
)
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.number_formats.universal import read_codebooks
from claq_exp.quantize.codebook.block_formats import LoBcq, NvFp4, Vsq

HAND = [
    [0, 1, -1, 2],
    [1, 0, -2, 1],
    [0, -1, 1, 1],
    [20, -18, 5, -7],
    [15, 30, -25, -6],
    [-22, 8, 12, -30],
]


def lo_bcq(array, codebooks, block=8, codeword_bits=6):
    return BlockFormat(4, array, "e4m3", LEARNED, block, codebooks, codeword_bits)


def normal(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy(rows, columns, seed):
    return normal(rows, columns, seed) / normal(rows, columns, seed + 1).abs().clamp(min=0.3)


def error_of(values, grid):
    rounded = round_values(values, grid)
    return float((values - rounded).square().sum() / values.square().sum())


def designed(values, block_format, **options):
    blocks = normalized_blocks(values, block_format)
    design = design_codebooks(blocks, 4, block_format.codebooks, **options)
    return FormatCodebooks(block_format, design.rounded(block_format.codeword_bits))


def slow_choice(blocks, books):
    """All distances at once, in float64: labels and errors."""
    misses = np.abs(blocks[:, None, :, None] - books[None, :, None, :]).min(axis=3)
    errors = (misses**2).sum(axis=2)
    return errors.argmin(axis=1), errors.min(axis=1)


def test_a_design_by_hand():
    blocks = np.array(HAND, dtype=np.float64)
    books = np.array([[-2.0, -1, 1, 2], [-24, -8, 8, 24]])
    labels, misses = np.zeros(6, dtype=np.int64), np.zeros(6)
    for error in (8.7916667, 7.796875, 7.796875):
        choose_codebooks(blocks, books, labels, misses)
        assert misses.mean() / 4 == pytest.approx(error, abs=1e-7)
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
        fit_codebooks(blocks, labels, books, 1)
        assert books.tolist() == [[-2, -1, 0.625, 2], [-23.75, -6.5, 10, 25]]


def test_the_compiled_choice_is_that_of_all_distances():
    blocks = normal(500, 8, 0).double().numpy()
    books = np.sort(normal(5, 16, 1).double().numpy(), axis=1)
    labels, misses = np.empty(500, dtype=np.int64), np.empty(500)
    choose_codebooks(blocks, books, labels, misses)
    expected = slow_choice(blocks, books)
    assert np.array_equal(labels, expected[0])
    assert np.allclose(misses, expected[1], rtol=1e-12)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("draw", [normal, heavy])
def test_neither_half_of_a_round_lets_the_error_grow(start, draw):
    blocks = normalized_blocks(draw(32, 512, 2), lo_bcq(64, 6))
    design = design_codebooks(blocks, 4, 6, start=start, rounds=15, tolerance=0.0)
    assert len(design.errors) >= 2
    assert (np.diff(design.errors) <= 1e-6 * np.array(design.errors[:-1])).all()
    assert (np.diff(design.codebooks, axis=1) >= 0).all()
    numbers, books = blocks.double().numpy(), design.codebooks.copy()
    labels, before = slow_choice(numbers, books)
    fit_codebooks(numbers, labels.astype(np.int64), books, 2)
    own = np.abs(numbers[:, :, None] - books[labels][:, None, :]).min(axis=2)
    assert (own**2).sum() <= before.sum() * (1 + 1e-9)


@pytest.mark.parametrize("draw", [normal, heavy])
def test_the_start_by_size_ends_lowest(draw):
    blocks = normalized_blocks(draw(16, 2048, 14), lo_bcq(64, 8))
    ends = {
        name: design_codebooks(blocks, 4, 8, start=name, rounds=30).errors[-1] for name in STARTS
    }
    assert min(ends, key=ends.__getitem__) == "largest"


def test_the_same_seed_gives_the_same_codebooks_and_another_one_others():
    blocks = normalized_blocks(heavy(16, 512, 3), lo_bcq(64, 4))

    def books(seed):
        return design_codebooks(blocks, 4, 4, start="kmeans++", seed=seed, rounds=5).codebooks

    assert np.array_equal(books(1), books(1))
    assert not np.array_equal(books(1), books(2))


def test_the_order_inside_a_block_does_not_matter_to_its_codebook():
    blocks = normal(300, 8, 4).double().numpy()
    books = np.sort(normal(4, 16, 5).double().numpy(), axis=1)
    shuffled = np.random.default_rng(0).permuted(blocks, axis=1)
    found = []
    for numbers in (blocks, shuffled):
        labels, misses = np.empty(300, dtype=np.int64), np.empty(300)
        choose_codebooks(numbers, books, labels, misses)
        found.append(labels)
    assert np.array_equal(*found)


def test_an_unused_codebook_starts_again_from_what_is_served_worst():
    numbers = np.tile(np.linspace(-1, 1, 8), (500, 1))
    numbers[400:] *= 50.0
    misses = np.where(np.arange(500) < 400, 0.01, 10.0)
    books = np.array([[-1.0, -0.3, 0.3, 1], [7, 8, 9, 10]])
    start_again(numbers, np.zeros(500, dtype=np.int64), misses, books)
    assert books[0].tolist() == [-1.0, -0.3, 0.3, 1]
    assert books[1] == pytest.approx(np.quantile(numbers[400:405], [1 / 8, 3 / 8, 5 / 8, 7 / 8]))


@pytest.mark.parametrize(("codebooks", "expected"), [(1, 8.3e-3), (8, 3.9e-3), (16, 3.3e-3)])
def test_errors_on_normal_numbers_are_as_known(codebooks, expected):
    grid = designed(normal(64, 2048, 7), lo_bcq(64, codebooks))
    assert error_of(normal(128, 2048, 8), grid) == pytest.approx(expected, rel=0.1)


def test_errors_fall_with_codebooks_smaller_arrays_and_smaller_blocks():
    train, test = normal(32, 2048, 9), normal(64, 2048, 10)
    by_format = {
        (array, block, count): error_of(
            test, designed(train, lo_bcq(array, count, block), rounds=15)
        )
        for array, block, count in [(64, 8, 2), (64, 8, 4), (64, 8, 8), (32, 8, 4), (64, 4, 4)]
    }
    assert by_format[64, 8, 2] > by_format[64, 8, 4] > by_format[64, 8, 8]
    assert by_format[32, 8, 4] < by_format[64, 8, 4]
    assert by_format[64, 4, 4] < by_format[64, 8, 4]


@pytest.mark.parametrize("draw", [normal, heavy])
def test_at_equal_bits_it_has_about_half_the_error_of_other_formats(draw):
    values = draw(128, 2048, 11)
    own = error_of(values, designed(draw(64, 2048, 12), lo_bcq(64, 8)))
    universal = error_of(
        values, FormatCodebooks(lo_bcq(64, 8), read_codebooks("universal", lo_bcq(64, 8)))
    )
    others = [
        error_of(values, FormatCodebooks.fixed(BlockFormat(4, 16, "e4m3", E2M1))),
        error_of(values, FormatCodebooks.fixed(BlockFormat(4, 16, "integer", INTEGER))),
    ]
    assert max(own, universal) < 0.8 * min(others)
    assert universal < 1.3 * own


def test_wider_codewords_are_no_worse():
    values, block_format = heavy(64, 2048, 13), lo_bcq(64, 8)
    design = design_codebooks(normalized_blocks(values, block_format), 4, 8)
    errors = [
        error_of(values, FormatCodebooks(lo_bcq(64, 8, codeword_bits=bits), design.rounded(bits)))
        for bits in (4, 6, 8)
    ]
    assert errors[0] > errors[1] > 0.98 * errors[2]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("array", [32, 64, 128])
@pytest.mark.parametrize("codebooks", [2, 4, 8, 16])
def test_the_package_has_codebooks_for_each_usual_format(bits, array, codebooks):
    block_format = LoBcq(array=array, codebooks=codebooks).block_format(bits)
    books = read_codebooks("universal", block_format)
    assert books.shape == (codebooks, 2**bits)
    assert (books == books.round()).all()
    assert (books.diff(dim=1) >= 0).all()
    assert books.abs().max() <= 31


def test_codebooks_of_a_file_and_of_no_file(tmp_path):
    path = tmp_path / "books.json"
    path.write_text(json.dumps({"designs": {"2/64/8/1": [[-1, -0.25, 0.25, 1]]}}), encoding="utf-8")
    block_format = LoBcq(codebooks=1).block_format(2)
    assert read_codebooks(str(path), block_format).tolist() == [[-31, -8, 8, 31]]
    with pytest.raises(ConfigError, match=r"4/64/8/1; there are: 2/64/8/1; choose one"):
        read_codebooks(str(path), LoBcq(codebooks=1).block_format(4))
    with pytest.raises(ConfigError, match="cannot be read as codebooks"):
        read_codebooks(str(tmp_path / "absent.json"), block_format)
    with pytest.raises(ConfigError, match="or books=local"):
        read_codebooks("universal", LoBcq(block=4).block_format(4))


def test_a_weight_of_few_blocks_still_gets_codebooks_of_its_own():
    for weight in (torch.zeros(4, 16), torch.ones(1, 3)):
        books = LoBcq(books="local", array=16).grid(weight, 4).codebooks
        assert books.shape == (8, 16)


def test_formats_of_weights_name_their_sizes():
    assert NvFp4().block_format(4).describe() == "e2m1, arrays of 16 (e4m3)"
    assert Vsq().block_format(3).bits_per_number() == 3.5
    assert LoBcq().block_format(4).describe() == "8 learned codebooks, arrays of 64 (e4m3)"
