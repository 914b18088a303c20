"""What a matrix on a table with group scales may choose: one width for all its columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from claq_exp.allocate.choices import MEASURED_BITS, Chooser
from claq_exp.payload.base import Layout
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.codebook.group_table import GroupTableCodebook
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class TableChoices(Chooser):
    """As `claq_exp.allocate.choices.Choices`, with the matrix itself as the one that chooses.

    shape: (out, in).  widths: [options] int64.  distortion: [1, options] float64, of the whole
    matrix.  The others as of `Choices`.
    """

    shape: tuple[int, int]
    widths: NDArray[np.int64]
    distortion: NDArray[np.float64]
    codebook: GroupTableCodebook
    nominal: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def columns(self) -> int:
        """Return how many choose: one."""
        return 1

    def share_of(self, _columns: int) -> float:
        """Return what stands for a whole matrix: this is all of it."""
        return 1.0

    def rates(self) -> NDArray[np.float64]:
        """Return the bits of the whole matrix at each width: [options] float64."""
        return np.array([self.bits(np.array([option])) for option in range(len(self.widths))])

    def fixed_bits(self) -> int:
        """Return 0: the rates have everything."""
        return 0

    def layout(self, plan: ColumnPlan) -> Layout:
        """Return how the matrix is stored with a plan."""
        return self.codebook.layout(self.shape[0], plan)

    def plan(self, chosen: NDArray[np.int64]) -> ColumnPlan:
        """Return the plan of an option: [1] int64."""
        columns, width = self.shape[1], int(self.widths[chosen[0]])
        return ColumnPlan(
            torch.full((columns,), width, dtype=torch.uint8),
            torch.zeros(columns, dtype=torch.int64),
        )


def measure_table(
    statistics: ColumnStatistics,
    codebook: GroupTableCodebook,
    widths: Sequence[int],
    *,
    nominal: bool,
) -> TableChoices:
    """Learn tables of several widths on some rows, and take their error for that of all.

    The distortion is the one of `measure_choices`: sum_ij g_i d_j (w_ij - q_ij)^2, with the
    distortion weight d of the columns and the importance g of the rows.  Wider codes than
    `MEASURED_BITS` are taken to quarter it with every bit.
    """
    measured = {bits: codebook.distortion(statistics, bits) for bits in _measured(widths)}
    known = [measured[min(bits, MEASURED_BITS)] for bits in widths]
    beyond = np.array([max(bits - MEASURED_BITS, 0) for bits in widths])
    distortion = np.array(known)[None, :] / 4.0**beyond
    return TableChoices(
        statistics.shape, np.array(widths, dtype=np.int64), distortion, codebook, nominal
    )


def _measured(widths: Sequence[int]) -> list[int]:
    return sorted({min(bits, MEASURED_BITS) for bits in widths})
