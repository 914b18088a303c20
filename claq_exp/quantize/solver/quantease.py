"""Coordinate descent on the codes, from a solution of a column loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from claq_exp.errors import ConfigError
from claq_exp.quantize.allocation import ColumnPlan
from claq_exp.quantize.solver.descent import Descent
from claq_exp.quantize.solver.sweeping import Sweeping
from claq_exp.quantize.solver.thresholds import Thresholds

SETTLING = 1 / 6  # of the sweeps, at the end, round all columns


@dataclass(frozen=True)
class QuantEase(Sweeping):
    """Code the columns of a solution again and again, each at its best while all others stay.

    With D = Q - W the loss tr(D H D^T) is least in column j at u_j = q_j - (D H)_j / H_jj, and
    grows by H_jj |q - u_j|^2 around it.  So each column is coded to u_j, with its codebook and its
    reserved entries; it keeps its old codes where the new ones are no nearer.  The loss, damped as
    GPTQ's, therefore never rises, and the result is never worse than the start.

    refit: fit the levels of a column to u_j whenever it is coded; false keeps those of the start,
        as in the paper, so that codes alone move, and reserved entries.
    escape_every: from the second sweep on, each sweep of so many leaves the columns unrounded
        (q_j = u_j), so that the next one leaves the local optimum; none does in the last sixth.
        The best solution is kept.  0 for none; the paper has 3, and 30 sweeps.
    The other fields are those of `Sweeping`.

    Source: QuantEase (arXiv 2309.01885), eq. 6 and Algorithm 2, in blocks of columns.
    """

    refit: bool = True
    escape_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.escape_every < 0 or self.escape_every == 1:
            raise ConfigError(
                f"solver.escape_every is {self.escape_every}; give 0 for no escapes, or at least 2 "
                "sweeps from one to the next"
            )
        if self.escape_every and not self.relaxed:
            raise ConfigError(
                f"solver.escape_every={self.escape_every} needs at least 3 sweeps, and "
                f"solver.sweeps is {self.sweeps}"
            )

    @property
    def relaxed(self) -> range:
        """The sweeps that leave columns unrounded, by their number from 0."""
        last = self.sweeps - math.ceil(self.sweeps * SETTLING)
        return range(1, last, self.escape_every) if self.escape_every else range(0)

    @property
    def work(self) -> tuple[int, int]:
        """The best columns so far beside those of sweeps, where they escape; see Solver."""
        squares, matrices = super().work
        return squares, matrices + bool(self.escape_every)

    @property
    def holds_levels(self) -> bool:
        """Whether levels stay as the start has them, see Solver."""
        return not self.refit

    @property
    def multiplies_on_device(self) -> bool:
        """Whether matrices may lie on a device, see Solver: they may, and codes are found here."""
        return True

    @property
    def moves_reserved(self) -> bool:
        """Whether reserved entries may move, see Solver."""
        return True

    def _descend(self, descent: Descent, plan: ColumnPlan) -> None:
        if not self.refit:
            descent.hold()
        descent.run(self.sweeps, self.relaxed, Thresholds.of(plan))
