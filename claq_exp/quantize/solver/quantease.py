"""Coordinate descent on the codes, from a solution of a column loop."""

from __future__ import annotations

from dataclasses import dataclass

from claq_exp.quantize.solver.descent import Descent
from claq_exp.quantize.solver.sweeping import Sweeping


@dataclass(frozen=True)
class QuantEase(Sweeping):
    """Code the columns of a solution again and again, each at its best while all others stay.

    With D = Q - W the loss tr(D H D^T) is least in column j at u_j = q_j - (D H)_j / H_jj, and
    grows by H_jj |q - u_j|^2 around it.  So each column is coded to u_j, with its codebook and its
    reserved entries; it keeps its old codes where the new ones are no nearer.  The loss, damped as
    GPTQ's, therefore never rises, and the result is never worse than the start.

    refit: fit the levels of a column to u_j whenever it is coded; false keeps those of the start,
        as in the paper, so that codes alone move, and reserved entries.
    The other fields are those of `Sweeping`.

    Source: QuantEase (arXiv 2309.01885), eq. 6 and Algorithm 2, in blocks of columns.
    """

    refit: bool = True

    @property
    def holds_levels(self) -> bool:
        """Whether levels stay as the start has them, see Solver."""
        return not self.refit

    def _descend(self, descent: Descent) -> None:
        if not self.refit:
            descent.quantizer.hold()
        descent.sweeps(self.sweeps)
