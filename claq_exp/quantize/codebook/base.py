"""What a codebook is: it says which values codes stand for, and codes columns with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from claq_exp.payload.base import Layout, Payload
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.statistics import ColumnStatistics


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
    """

    mixed_widths: ClassVar[bool]
    reserves: ClassVar[bool]
    relative_cost: ClassVar[float] = 1.0

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
