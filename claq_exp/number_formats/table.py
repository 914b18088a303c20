"""Codewords with what finds the nearest of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.number_formats.compiled import WIDTH
from claq_exp.number_formats.formats import E2M1, LEARNED, BlockFormat

HALVES = 2  # places of a step between two thresholds: on one, and behind it


@dataclass(frozen=True)
class FormatCodebooks:
    """A block format with the codewords that its codes stand for.

    codebooks: [codebooks, 2**bits] float32, each ascending, multiples of the format's unit.
    """

    format: BlockFormat
    codebooks: Tensor

    @staticmethod
    def fixed(block_format: BlockFormat) -> FormatCodebooks:
        """Return the grid of a format that does not learn its codewords."""
        return FormatCodebooks(block_format, block_format.fixed_codebook())

    @cached_property
    def table(self) -> LookupTable:
        """What finds the nearest codeword, on the CPU."""
        return _lookup_table(self)


@dataclass(frozen=True)
class LookupTable:
    """The nearest codeword of every codebook, by place.

    All codewords are multiples of a unit, and all thresholds between two of them of half a unit.
    The place of a number x is floor(x * resolution) + ceil(x * resolution) + offset: an even one
    where x is such a multiple, and may lie on a threshold; an odd one where it lies between two.

    codes: [places, codebooks] uint8.  codewords: [places, codebooks] float32.
    """

    codes: Tensor
    codewords: Tensor
    resolution: float
    offset: int

    def places(self, scaled: Tensor) -> Tensor:
        """Return the place of each number, int64; those beyond the table are at its ends."""
        steps = scaled * self.resolution
        limit = self.offset / HALVES
        steps = steps.clamp(-limit, limit)
        return (steps.floor() + steps.ceil()).long() + self.offset

    @cached_property
    def padded(self) -> NDArray[np.float32]:
        """The codewords, and infinite ones in the place of codebooks up to `WIDTH`."""
        padded = np.full((len(self.codewords), WIDTH), np.inf, dtype=np.float32)
        padded[:, : self.codewords.shape[1]] = self.codewords.numpy()
        return padded


def _lookup_table(grid: FormatCodebooks) -> LookupTable:
    books, unit = grid.codebooks.double(), grid.format.unit
    resolution = HALVES / unit
    reach = int(resolution * (float(books.abs().max()) + unit))
    places = torch.arange(-HALVES * reach, HALVES * reach + 1)
    values = places.double() / HALVES / resolution
    codes = torch.stack([_nearest(book, values, grid.format) for book in books], dim=1)
    codewords = torch.stack([book[codes[:, k]] for k, book in enumerate(books)], dim=1)
    return LookupTable(codes.to(torch.uint8), codewords.float(), resolution, HALVES * reach)


def _nearest(book: Tensor, values: Tensor, block_format: BlockFormat) -> Tensor:
    """Return the code of the codeword next to each value: [n] int64.

    Midway between two, the upper one of a learned codebook; else that with an even last digit, as
    IEEE rounding has it.
    """
    upper = torch.bucketize(values, (book[1:] + book[:-1]) / 2, right=True)
    if block_format.codewords == LEARNED:
        return upper
    lower = torch.bucketize(values, (book[1:] + book[:-1]) / 2)
    return torch.where(_even(book, block_format)[lower], lower, upper)


def _even(book: Tensor, block_format: BlockFormat) -> Tensor:
    """Tell of each codeword of a format with fixed ones whether its last binary digit is 0."""
    if block_format.codewords == E2M1:
        return torch.isin(book.abs(), torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=book.dtype))
    return book % 2 == 0
