"""What a codebook is: it says which values codes stand for, and codes columns with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.payload.base import Layout, Payload
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.statistics import ColumnStatistics


@dataclass(frozen=True)
class Tables:
    """The levels of a coded matrix, columns in the matrix's own order.

    by_row: a table for each row; else one for each column.
    levels: [tables, entries] float32 of float16 values; 0 where a narrow table has no such level.
    codes: [in, out] uint8.  free: [in, out] bool, entries that their code stands for; the others
        are reserved.
    row_scales: [out] float32 that multiply the levels; None without.
    """

    by_row: bool
    levels: Tensor
    codes: Tensor
    free: Tensor
    row_scales: Tensor | None = None


class ColumnQuantizer(Protocol):
    """The state of one matrix while its columns are fitted and coded, in any order.

    A column may be coded again; what was found of it before is then replaced.

    unconverged: columns whose fit used up its passes, where a codebook is fitted by passes.
    """

    unconverged: int = 0

    def code_column(self, column: int, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fit and code a column as it is now, [out]; return what is stored of it: [out]."""

    def compiled(self) -> NamedTuple | None:
        """Return the task of a compiled `code_column`, for loops that are compiled themselves.

        Its type is registered by `claq_exp.quantize.codebook.compiled.codes`.  None: there is
        none, and loops call `code_column` of this class.
        """
        return None

    def payload(self) -> Payload:
        """Return the quantized matrix, once every column is done."""

    def tables(self) -> Tables | None:
        """Return the levels and what the codes choose, once every column is done.

        None where levels are not free, see `Codebook.free_levels`.
        """
        return None

    def settle(self, levels: Tensor) -> None:
        """Take other levels for the codes as they are, and keep them while columns are coded again.

        levels: as of `tables`, of numbers that float16 holds, in any order.  Reserved entries keep
        their places from now on.
        """
        raise ValueError("a quantizer whose levels are not free")

    def hold(self, held: bool = True) -> None:
        """Keep the levels as they are, once every column is done, while columns are coded again.

        held: false lets the codebook fit them again.
        Raises ValueError where the codebook is none that `holds_levels`.
        """
        raise ValueError("a quantizer that fits levels whenever it codes")

    def reserve(self, places: Tensor | None) -> None:
        """Reserve these entries from now on, and none that the plan says; code all columns again.

        places: [in, out] bool, in the matrix's own order; None for as many as planned, as each
            column is when it is coded.
        Raises ValueError where the codebook is none that `holds_levels` and `reserves`.
        """
        raise ValueError("a quantizer that chooses itself which entries are reserved")


@dataclass(frozen=True)
class DeviceRule:
    """How the kernel of a device does what a codebook does: k-means, a codebook per column.

    row_scales: on rows that are divided by their root mean square.
    """

    row_scales: bool


class Codebook(Protocol):
    """A rule for the values of codes.

    mixed_widths: columns of one matrix may have different widths.
    reserves: works with reserved entries.
    relative_cost: its time for a column over that of kmeans, for estimates.
    free_levels: every level of its tables may be any number of float16, whatever the others are.
    holds_levels: its quantizers can `hold` the levels that they have, and can `reserve` given
        entries where the codebook `reserves`.
    """

    mixed_widths: ClassVar[bool]
    reserves: ClassVar[bool]
    relative_cost: ClassVar[float] = 1.0
    holds_levels: ClassVar[bool] = False

    @property
    def free_levels(self) -> bool:
        """Whether a solver may choose the levels, see Codebook."""
        return False

    def check(self, bits: int) -> None:
        """Raise ConfigError where there are no codes of so many bits."""
        return

    def layout(self, rows: int, plan: ColumnPlan) -> Layout:
        """Return how a matrix of so many rows is stored with a plan."""

    def start(self, statistics: ColumnStatistics, plan: ColumnPlan) -> ColumnQuantizer:
        """Begin a matrix; statistics.weight is before compensation."""

    def device_rule(self) -> DeviceRule | None:
        """Return what a device's kernel does in this codebook's place; None: the CPU does it."""
        return None
