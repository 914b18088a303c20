"""Best levels for the codes, best codes for the levels, in turn, from a solution of GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError
from claq_exp.payload.stored import HALF_MAX
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.solver.level_fits import Assignment, column_steps, row_steps
from claq_exp.quantize.solver.quantease import Descent, QuantEase
from claq_exp.quantize.symmetric import product


@dataclass(frozen=True)
class Alternating(QuantEase):
    """Alternate between the levels, all at once, and the codes, a column after the other.

    While the codes stay, the loss is a square in the levels, and their best is the solution of a
    linear system (`level_fits`).  They are rounded to float16 and kept only where the loss is then
    lower: row by row, or for all columns together.  While the levels stay, sweeps of coordinate
    descent code each column to its best; reserved entries keep their places and take their best
    value.  So the loss, damped as GPTQ's, never rises.

    rounds: of levels and codes.  sweeps: over all columns, in each round.
    The other fields are those of `QuantEase`.  Matrices whose codebook an allocation chose, and
    whose levels are not free, get the sweeps of `QuantEase`.

    Source: LNQ (GuidedQuant, arXiv 2505.07004, appendix), for tables of rows.
    """

    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise ConfigError(f"solver.rounds is {self.rounds}; give a positive number")

    @property
    def passes(self) -> int:
        """The start, and the sweeps of all rounds; levels cost about two more in each."""
        return 1 + self.rounds * (self.sweeps + 2)

    @property
    def work(self) -> tuple[int, int]:
        """Two matrices of codes, slopes, products and the new values beside QuantEase's."""
        squares, matrices = super().work
        return squares, matrices + 8

    @property
    def fits_levels(self) -> bool:
        """Tell that it does, see Solver."""
        return True

    @property
    def row_groups(self) -> bool:
        """Whether groups of rows may have a Hessian each: levels are fitted on one."""
        return False

    def prepare(self, moments: Moments) -> ColumnSystem:
        """Order the columns and factorize the mean over groups, see Solver."""
        return self._system(moments, self._order(moments))

    def _descend(self, descent: Descent) -> None:
        if descent.quantizer.tables() is None:
            super()._descend(descent)
            return
        for _ in range(self.rounds):
            moved = fit_levels(descent)
            if not descent.sweeps(self.sweeps) and not moved:
                break


def fit_levels(descent: Descent) -> bool:
    """Give a matrix the best levels for its codes; tell whether any has changed."""
    tables = descent.quantizer.tables()
    if tables is None:
        raise ValueError("a quantizer without free levels")
    order = descent.system.order
    codes, coded = (part.index_select(0, order) for part in (tables.codes, tables.free))
    alive = ~descent.system.dead[order]
    system, free = descent.system, coded & alive[:, None]
    assigned = Assignment(system.hessian, codes.long(), free, system.wide)
    slope = descent.slope(slice(None))
    entries = tables.levels.shape[1]
    if tables.by_row:
        levels = rounded(tables.levels + row_steps(assigned, slope, entries))
        values = levels.gather(1, assigned.codes.t()).t()
    else:
        scales = torch.ones(slope.shape[1]) if tables.row_scales is None else tables.row_scales
        levels = tables.levels.double()
        levels[order] += column_steps(assigned, slope, entries, scales, descent.importance)
        levels = rounded(levels)
        values = levels.index_select(0, order).gather(1, assigned.codes) * scales
    found = torch.where(coded, values.clamp(-HALF_MAX, HALF_MAX), descent.found)
    grown = _grown(descent, slope, found, alive)
    if not tables.by_row:  # all rows have their levels from all tables
        grown = (grown @ descent.importance.double()).expand(len(grown))
    better = grown < 0
    tables_better = better[:, None] if tables.by_row else better[:1, None]
    descent.settle(
        torch.where(tables_better, levels, tables.levels),
        torch.where(better, found, descent.found),
    )
    return bool(better.any())


def rounded(levels: Tensor) -> Tensor:
    """Return the nearest numbers of float16, as float32."""
    return levels.clamp(-HALF_MAX, HALF_MAX).half().float()


def _grown(descent: Descent, slope: Tensor, found: Tensor, alive: Tensor) -> Tensor:
    """Return by how much the loss of each row grows with other stored values: [out] float64."""
    step = torch.where(alive[:, None], found - descent.found, 0.0)
    grown = product(descent.system.hessian, step, wide=descent.system.wide)
    grown.add_(slope, alpha=2).mul_(step)
    return grown.sum(dim=0, dtype=torch.float64)
