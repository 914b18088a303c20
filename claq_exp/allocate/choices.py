"""Spends a budget of bits where they lower the loss most: over all columns of all matrices at once.

Every column may take one of several options, a code width and a number of reserved entries; each
has a rate (all the bits it stores) and a distortion (its squared error times what an error in the
column costs).  With a price per bit every column chooses for itself, and the price is sought at
which the choices just fit the budget (Shoham and Gersho, 1988); what is left is spent on single
columns.
Optimal for this separable model of the loss up to the last column's step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from claq_exp.errors import ConfigError
from claq_exp.payload.base import Layout
from claq_exp.payload.stored import HALF, MAX_BITS, index_width, packed_bytes
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.compiled import FITTED, column_distortions
from claq_exp.quantize.codebook.group_table import GroupTableCodebook
from claq_exp.quantize.codebook.kmeans import KMeans, root_mean_squares, shared_codebooks
from claq_exp.quantize.statistics import ColumnStatistics

MEASURED_BITS = 4  # wider codes are taken to quarter the distortion with every bit
RESERVED_BITS = 3  # widest code beside which reservation is considered
ROUNDS = 50  # halvings of the range of the price of a bit
HIGHEST_PRICE = 1e60


class Form(Protocol):
    """A codebook whose errors are known before a matrix is quantized."""

    @property
    def widest(self) -> int:
        """The bits of the longest codes that there can be."""

    def column_bits(self, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bits of a column beside its codes, by its width: [any] each."""

    def fixed_bits(self, rows: int, columns: int) -> int:
        """Return about what a matrix stores beside its columns."""

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""


@dataclass(frozen=True)
class Choices:
    """What the columns of one matrix may choose.

    options: [options, 2] int64, width and reserved count.
    distortion: [columns, options] float64, in the same unit for all matrices of an allocation.
    codebook: says how the matrix is stored.
    nominal: rates are what papers print, not everything that is stored.
    """

    rows: int
    options: NDArray[np.int64]
    distortion: NDArray[np.float64]
    codebook: Form
    nominal: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    @property
    def columns(self) -> int:
        """Number of columns."""
        return len(self.distortion)

    def rates(self) -> NDArray[np.float64]:
        """Return the bits that a column with each option stores: [options] float64."""
        widths, counts = self.options[:, 0], self.options[:, 1]
        if self.nominal:
            return np.asarray(widths * (self.rows - counts) + counts * HALF, dtype=np.float64)
        codes = np.array([8 * packed_bytes(self.rows, int(width)) for width in widths])
        kept = counts * (HALF + index_width(self.rows))
        return np.asarray(codes + self.codebook.column_bits(widths) + kept, np.float64)

    def fixed_bits(self, columns: int) -> int:
        """Return about what a matrix of so many such columns stores beside, where that counts."""
        return 0 if self.nominal else self.codebook.fixed_bits(self.rows, columns)

    def layout(self, plan: ColumnPlan) -> Layout:
        """Return how the matrix is stored with these widths and reserved counts."""
        return self.codebook.layout(self.rows, plan)

    def plan(self, chosen: NDArray[np.int64]) -> ColumnPlan:
        """Return widths and reserved counts of the columns that choose so: [columns] int64."""
        picked = torch.from_numpy(self.options[chosen])
        return ColumnPlan(picked[:, 0].to(torch.uint8), picked[:, 1].contiguous())

    def bits(self, chosen: NDArray[np.int64]) -> float:
        """Return the bits of the whole matrix when its columns choose so: [columns] int64."""
        layout = self.layout(self.plan(chosen))
        return layout.nominal_bits() * layout.weights if self.nominal else layout.ledger().total

    def cheapest(self) -> NDArray[np.int64]:
        """Return what columns choose that take the fewest bits: [columns] int64."""
        return np.full(self.columns, int(np.argmin(self.rates())))

    def least(self) -> float:
        """Return the fewest bits that the matrix can take."""
        return self.bits(self.cheapest())


def column_options(
    rows: int, widths: Sequence[int], reserved_shares: Sequence[float]
) -> NDArray[np.int64]:
    """Return the options of a column: [options, 2] int64, those of one reserved count together."""
    counts = sorted({0, *(max(1, round(share * rows)) for share in reserved_shares)})
    return np.array(
        [
            (width, count)
            for count in counts
            for width in widths
            if count == 0 or (width <= RESERVED_BITS and count <= rows)
        ],
        dtype=np.int64,
    )


def measure_choices(
    statistics: ColumnStatistics,
    codebook: KMeans,
    options: NDArray[np.int64],
    *,
    nominal: bool,
    columns: torch.Tensor | None = None,
) -> Choices:
    """Fit codebooks to the columns as they stand, at every option.

    columns: [n] int64, measure only these.  The distortion is sum_i g_i (w_ij - q_ij)^2 times the
    column's distortion weight, with the importance g of the rows.
    """
    rows = statistics.shape[0]
    weight, importance, scales = statistics.weight, statistics.importance(), None
    if codebook.row_scales:
        scales = root_mean_squares(weight)
        weight = weight / scales.float()[:, None]
        importance = importance * scales.float().square()
    measured, place, beyond = _measured(options)
    widths = torch.from_numpy(np.unique(measured[:, 0])).to(torch.uint8)
    books = np.zeros((MAX_BITS + 1, 2**MAX_BITS), dtype=np.float32)
    if codebook.shared:
        for width, book in shared_codebooks(statistics, widths, scales).items():
            books[width, : len(book)] = book.half().float().numpy()
    chosen = torch.arange(weight.shape[1]) if columns is None else columns
    values = weight.t()[chosen].contiguous().numpy()
    rule = FITTED if codebook.shared else codebook.rule
    workers, level_set = torch.get_num_threads(), codebook.level_set().numpy()
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(
            lambda part: column_distortions(
                part, importance.numpy(), measured, rule, books, level_set
            ),
            np.array_split(values, 4 * workers),
        )
        found = np.concatenate(list(parts))
    found *= statistics.distortion_weight[chosen].double().numpy()[:, None]
    return Choices(rows, options, found[:, place] / 4.0**beyond, codebook, nominal)


def measure_tables(
    statistics: ColumnStatistics,
    codebook: GroupTableCodebook,
    options: NDArray[np.int64],
    *,
    nominal: bool,
) -> Choices:
    """Learn tables on some rows of the matrix as it stands, at every option.

    The distortion is as of `measure_choices`.
    """
    measured, place, beyond = _measured(options)
    found = codebook.distortions(statistics, measured)
    found *= statistics.distortion_weight.double().numpy()[:, None]
    distortion = found[:, place] / 4.0**beyond
    return Choices(statistics.shape[0], options, distortion, codebook, nominal)


def _measured(
    options: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the options that are measured, which of them stands for each, and the bits beyond."""
    known = options.copy()
    known[:, 0] = np.minimum(known[:, 0], MEASURED_BITS)
    by_count, place = np.unique(known[:, ::-1], axis=0, return_inverse=True)
    measured = np.ascontiguousarray(by_count[:, ::-1])
    return measured, place.ravel(), options[:, 0] - known[:, 0]


def allocate(matrices: Sequence[Choices], budget: float) -> list[ColumnPlan]:
    """Choose an option for every column so that all matrices together store at most `budget` bits.

    Raises ConfigError, with the range that can be reached, when even the cheapest options do not
    fit.
    """
    rates = [matrix.rates() for matrix in matrices]
    least = _total(matrices, _choose(matrices, rates, np.inf))
    if least > budget:
        dearest = _total(matrices, _choose(matrices, rates, 0.0))
        weights = sum(matrix.weights for matrix in matrices)
        raise ConfigError(
            f"a budget that leaves columns {budget / weights:.4g} bits per weight cannot be met; "
            f"these strategies reach from {least / weights:.4g} to {dearest / weights:.4g}"
        )
    low, high = _price_range(
        lambda price: _total(matrices, _choose(matrices, rates, price)), budget
    )
    chosen = _choose(matrices, rates, high)
    _spend_rest(matrices, rates, chosen, _choose(matrices, rates, low), budget)
    return [matrix.plan(choice) for matrix, choice in zip(matrices, chosen, strict=True)]


def choose_variants(
    samples: Sequence[Sequence[Choices]], columns: Sequence[int], budget: float
) -> list[int]:
    """Return which of its variants suits each matrix best at the price that fits the budget.

    samples: per matrix and variant, the choices of some of its columns.  columns: how many there
    are in all.
    """

    priced = [[(sample, sample.rates()) for sample in variants] for variants in samples]

    def at_price(price: float) -> tuple[float, list[int]]:
        bits, picked = 0.0, []
        for variants, count in zip(priced, columns, strict=True):
            costs = []
            for sample, rates in variants:
                option = np.argmin(sample.distortion + price * rates, axis=1)
                share = count / sample.columns
                distortion = sample.distortion[np.arange(sample.columns), option].sum() * share
                stored = rates[option].sum() * share + sample.fixed_bits(count)
                costs.append((distortion + price * stored, stored))
            best = min(range(len(costs)), key=lambda at: costs[at][0])
            picked.append(best)
            bits += costs[best][1]
        return bits, picked

    return at_price(_price_range(lambda price: at_price(price)[0], budget)[1])[1]


def _price_range(total: Callable[[float], float], budget: float) -> tuple[float, float]:
    """Return two prices close together, the lower of which breaks the budget; (0, 0) if none does.

    total: bits stored at a price per bit, falling with it.
    """
    if total(0.0) <= budget:
        return 0.0, 0.0
    low, high = 1.0, 1.0
    while total(high) > budget and high < HIGHEST_PRICE:
        low, high = high, high * 16
    while total(low) <= budget and low > 1 / HIGHEST_PRICE:
        low, high = low / 16, low
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        if total(middle) > budget:
            low = middle
        else:
            high = middle
    return low, high


def _choose(
    matrices: Sequence[Choices], rates: list[NDArray[np.float64]], price: float
) -> list[NDArray[np.int64]]:
    """Return what each column chooses at a price per bit; at an infinite price the cheapest."""
    if np.isinf(price):
        return [matrix.cheapest() for matrix in matrices]
    return [
        np.argmin(matrix.distortion + price * rate, axis=1)
        for matrix, rate in zip(matrices, rates, strict=True)
    ]


def _total(matrices: Sequence[Choices], chosen: list[NDArray[np.int64]]) -> float:
    return sum(matrix.bits(choice) for matrix, choice in zip(matrices, chosen, strict=True))


def _spend_rest(
    matrices: Sequence[Choices],
    rates: list[NDArray[np.float64]],
    chosen: list[NDArray[np.int64]],
    dearer: list[NDArray[np.int64]],
    budget: float,
) -> None:
    """Move single columns to their dearer choice, in place, while the budget holds.

    The best exchange of distortion for bits comes first; a matrix's own overhead (the map of
    widths, the counts) is looked up again after each.
    """
    moves = []
    for index, (matrix, rate) in enumerate(zip(matrices, rates, strict=True)):
        columns = np.flatnonzero(chosen[index] != dearer[index])
        before, after = chosen[index][columns], dearer[index][columns]
        gain = matrix.distortion[columns, before] - matrix.distortion[columns, after]
        cost = np.maximum(rate[after] - rate[before], 1e-9)
        moves += [(g / c, index, j) for g, c, j in zip(gain, cost, columns.tolist(), strict=True)]
    bits = [matrix.bits(choice) for matrix, choice in zip(matrices, chosen, strict=True)]
    total = sum(bits)
    for _, index, column in sorted(moves, reverse=True):
        before = chosen[index][column]
        chosen[index][column] = dearer[index][column]
        now = matrices[index].bits(chosen[index])
        if total - bits[index] + now > budget:
            chosen[index][column] = before
        else:
            total, bits[index] = total - bits[index] + now, now
