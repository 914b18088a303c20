"""Locally optimal block clustered quantization: a few codebooks that suit the blocks of numbers.

A reconstruction of LO-BCQ (arXiv 2502.05376) from secondary sources: docs/bcq.md says what in it is
the paper's and what is a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.errors import ConfigError, one_of
from claq_exp.number_formats.encoding import array_maxima
from claq_exp.number_formats.formats import BlockFormat
from claq_exp.number_formats.search import spread

Books = NDArray[np.float64]
ROUNDS = 50
TOLERANCE = 1e-5  # of the error, below which another round is not worth it
PASSES = 3  # of Lloyd-Max in a round, from the codebooks of the round before
FIRST_PASSES = 50  # of Lloyd-Max at the start
WORST = 0.01  # of the blocks, those that an unused codebook starts again from


@dataclass(frozen=True)
class Design:
    """Codebooks, and how they were found.

    codebooks: [codebooks, 2**bits] float64, each ascending, by their largest entry; in units in
    which the largest magnitude of an array is about 1.
    errors: mean squared error after each clustering, in the same units; it never grows.
    """

    codebooks: Books
    errors: tuple[float, ...]

    def rounded(self, codeword_bits: int) -> Tensor:
        """Return the codebooks as integers of so many bits: float32, see `round_codebooks`."""
        return round_codebooks(torch.from_numpy(self.codebooks), codeword_bits)


def round_codebooks(codebooks: Tensor, codeword_bits: int) -> Tensor:
    """Round codebooks in units of the largest magnitude to signed integers: float32, ascending.

    From -top to top with top = 2**(codeword_bits - 1) - 1.
    """
    top = 2 ** (codeword_bits - 1) - 1
    return ((codebooks.double() * top).round().clamp(-top, top) + 0.0).sort(dim=1).values.float()


def normalized_blocks(values: Tensor, block_format: BlockFormat) -> Tensor:
    """Return the blocks of numbers as codebooks see them, over the largest codeword.

    values: [rows, columns].  Each row has its own outer scale.  Arrays of zeros, and what does not
    fill a block, are left out.  Returns [blocks, block] float32.
    """
    columns = values.shape[1] // block_format.block * block_format.block
    if not columns:
        return values.new_empty(0, block_format.block, dtype=torch.float32)
    values = values[:, :columns].float()
    maxima = array_maxima(values, block_format.array)
    limit = maxima.amax(dim=1, keepdim=True)
    stored = block_format.rule.find(maxima, limit, block_format.top)
    steps = block_format.rule.read(stored, limit, block_format.top) * block_format.top
    wide = spread(steps, block_format.array, columns)
    blocks = (values / wide).reshape(-1, block_format.block)
    return blocks[wide.reshape(-1, block_format.block)[:, 0] > 0]


def design_codebooks(
    blocks: Tensor,
    bits: int,
    codebooks: int,
    *,
    start: str = "largest",
    seed: int = 0,
    rounds: int = ROUNDS,
    tolerance: float = TOLERANCE,
) -> Design:
    """Alternate between giving blocks to codebooks and fitting codebooks to their blocks.

    A block goes to the codebook under which its squared error is smallest, the first of equals; a
    codebook is then fitted to the numbers of its blocks by Lloyd-Max, from where it was.  Neither
    step lets the error grow.

    blocks: [n, block].  bits: of a code.  start: a name of `STARTS`.
    rounds, tolerance: it ends after so many rounds, or when one lowers the error by less.
    """
    if start not in STARTS:
        raise ConfigError(one_of("start", start, STARTS))
    numbers = np.ascontiguousarray(blocks.double().numpy())
    if len(numbers) < codebooks:
        raise ConfigError(f"{len(numbers)} blocks are too few for {codebooks} codebooks")
    labels = STARTS[start](numbers, codebooks, np.random.RandomState(seed))
    books = _spaced(numbers, labels, codebooks, 2**bits)
    fit_codebooks(numbers, labels, books, FIRST_PASSES)
    misses, errors = np.empty(len(numbers)), list[float]()
    for _ in range(rounds):
        choose_codebooks(numbers, books, labels, misses)
        errors.append(float(misses.mean()) / numbers.shape[1])
        if len(errors) > 1 and errors[-2] - errors[-1] <= tolerance * errors[-2]:
            break
        start_again(numbers, labels, misses, books)
        fit_codebooks(numbers, labels, books, PASSES)
    order = np.argsort(np.abs(books).max(axis=1), kind="stable")
    return Design(books[order], tuple(errors))


def _spaced(numbers: Books, labels: NDArray[np.int64], codebooks: int, entries: int) -> Books:
    """Return evenly spaced codewords over the range of each codebook's numbers."""
    books = np.zeros((codebooks, entries))
    for book in range(codebooks):
        own = numbers[labels == book]
        low, high = (own.min(), own.max()) if own.size else (numbers.min(), numbers.max())
        width = (high - low) / entries
        books[book] = low + width * (np.arange(entries) + 0.5)
    return books


def start_again(
    numbers: Books, labels: NDArray[np.int64], misses: NDArray[np.float64], books: Books
) -> None:
    """Have codebooks that no block uses start from the blocks that are served worst."""
    unused = np.setdiff1d(np.arange(len(books)), labels)
    if not len(unused):
        return
    worst = np.argsort(-misses, kind="stable")[: max(1, int(WORST * len(numbers)))]
    for part, book in enumerate(unused):
        own = numbers[worst[part :: len(unused)]]
        if own.size:
            books[book] = np.quantile(own, (np.arange(books.shape[1]) + 0.5) / books.shape[1])


@njit(cache=True, nogil=True, error_model="numpy")
def _nearest(book, value):  # type: ignore[no-untyped-def]
    """Return the code of the codeword next to a value, the upper one midway between two."""
    low, high = 0, len(book) - 1
    while low < high:
        middle = (low + high) // 2
        if value >= 0.5 * (book[middle] + book[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True, error_model="numpy")
def choose_codebooks(blocks, books, labels, misses):  # type: ignore[no-untyped-def]
    """Give each block to the codebook of the smallest squared error, the first of equals.

    blocks: [n, block] float64.  books: [codebooks, entries] float64.
    labels: [n] int64 and misses: [n] float64, that error; both overwritten.
    """
    for index in range(len(blocks)):
        best, chosen = np.inf, 0
        for book in range(len(books)):
            error = 0.0
            for value in blocks[index]:
                miss = value - books[book, _nearest(books[book], value)]
                error += miss * miss
            if error < best:
                best, chosen = error, book
        labels[index], misses[index] = chosen, best


@njit(cache=True, nogil=True, error_model="numpy")
def fit_codebooks(blocks, labels, books, passes):  # type: ignore[no-untyped-def]
    """Move each codeword to the mean of the numbers that are nearest to it, `passes` times.

    A codeword without numbers stays where it is (Lloyd-Max).  books: overwritten.
    """
    sums, counts = np.empty(books.shape), np.empty(books.shape)
    for _ in range(passes):
        sums[:], counts[:] = 0.0, 0.0
        for index in range(len(blocks)):
            book = labels[index]
            for value in blocks[index]:
                code = _nearest(books[book], value)
                sums[book, code] += value
                counts[book, code] += 1.0
        for book in range(len(books)):
            for code in range(books.shape[1]):
                if counts[book, code] > 0.0:
                    books[book, code] = sums[book, code] / counts[book, code]


def _by_largest(numbers: Books, codebooks: int, _: np.random.RandomState) -> NDArray[np.int64]:
    """Cut the blocks, sorted by their largest magnitude, into equal parts."""
    labels = np.empty(len(numbers), dtype=np.int64)
    order = np.argsort(np.abs(numbers).max(axis=1), kind="stable")
    labels[order] = np.arange(len(numbers)) * codebooks // len(numbers)
    return labels


def _by_chance(numbers: Books, codebooks: int, random: np.random.RandomState) -> NDArray[np.int64]:
    """Give each block to any codebook."""
    return random.randint(0, codebooks, len(numbers)).astype(np.int64)


def _by_seeds(numbers: Books, codebooks: int, random: np.random.RandomState) -> NDArray[np.int64]:
    """Choose seeds by squared distance (k-means++), and give each block to the nearest."""
    nearest = np.full(len(numbers), np.inf)
    labels = np.zeros(len(numbers), dtype=np.int64)
    seed = random.randint(len(numbers))
    for book in range(codebooks):
        distances = ((numbers - numbers[seed]) ** 2).sum(axis=1)
        closer = distances < nearest
        labels[closer], nearest = book, np.minimum(nearest, distances)
        total = nearest.sum()
        seed = random.choice(len(numbers), p=nearest / total) if total > 0 else 0
    return labels


STARTS: dict[str, Callable[[Books, int, np.random.RandomState], NDArray[np.int64]]] = {
    "largest": _by_largest,
    "kmeans++": _by_seeds,
    "random": _by_chance,
}
