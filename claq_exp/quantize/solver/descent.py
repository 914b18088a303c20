"""Coordinate descent on the columns of one matrix: sweeps in which each is coded again."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.quantize.codebook.base import ColumnQuantizer
from claq_exp.quantize.solver.columns import ColumnSystem, parts_of, recode
from claq_exp.quantize.solver.compiled import (
    closer,
    compensate,
    descend_block,
    descend_block_of_groups,
)
from claq_exp.quantize.solver.thresholds import Thresholds, largest_eigenvalue
from claq_exp.quantize.symmetric import bands, product

BLOCKS = 4  # of columns that are one panel: products of more rows are faster


@dataclass(frozen=True, kw_only=True)
class DescentSystem(ColumnSystem):
    """A column system whose columns are coded again.

    hessian: [in, in] float32, H + diag(added), rows and columns in visiting order.
    lost: [in, in] float32, the solver's share of the cross moment, 2/n * sum of
        (x_teacher - x_student) x_student^T, columns in visiting order and rows in the matrix's own;
        None where nothing is made up for.
    """

    hessian: Tensor
    lost: Tensor | None = None


@dataclass(frozen=True)
class _Kept:
    """A state of a descent.

    loss: its objective.  coded: what its columns were coded from, [in, out].
    places: of its reserved entries, [in, out] bool; None for those planned.
    """

    loss: float
    coded: Tensor
    places: Tensor | None


class Descent:
    """The sweeps over one matrix, its columns in visiting order.

    weight: [out, in] float32.  quantizer: has coded every column.
    system: a `DescentSystem`, or one of them for each group of rows, with its vectors on the CPU.
        Where its matrices are, they are multiplied; columns are coded on the CPU.
    coded: [in, out] float32, the columns that it was given.
    importance: [out] float32, of the rows, for the codebooks and what counts as nearer.
    found: [in, out] float32, the columns as they are stored.
    """

    def __init__(
        self,
        weight: Tensor,
        system: Any,
        quantizer: ColumnQuantizer,
        coded: Tensor,
        importance: Tensor,
    ) -> None:
        self.system, self.quantizer, self._coded = system, quantizer, coded
        order = system.order
        self.found = quantizer.payload().dequantize().t().index_select(0, order)
        self.importance = importance
        self._parts: list[tuple[DescentSystem, slice]] = parts_of(system, len(weight))  # type: ignore[assignment]
        self._device = self._parts[0][0].hessian.device
        self._missed = (self.found - weight.t().index_select(0, order)).to(self._device)
        self._wanted = [self._wanted_of(part, weight[rows]) for part, rows in self._parts]
        self._block_size = self._parts[0][0].block_size
        self._panels = list(bands(len(self.found), BLOCKS * self._block_size))
        self._prices = torch.stack([part.hessian.diagonal().cpu() for part, _ in self._parts])
        self._ratios = [self._ratios_of(panel) for panel in self._panels]
        self._earlier = torch.empty_like(self._missed)  # what earlier panels are of (D H) in each
        self._swept = False  # whether that is so
        self._held = False
        self._places: Tensor | None = None  # of reserved entries; None for those planned

    def _wanted_of(self, part: DescentSystem, weight: Tensor) -> Tensor | None:
        """Return what an asymmetric solver wants of the columns: [in, out], of a group of rows."""
        if part.lost is None:
            return None
        return product(part.lost.t(), weight.t().to(self._device), wide=part.wide)

    def _ratios_of(self, panel: slice) -> Tensor:
        """Return H_pk / H_pp of a panel, of each group of rows: [groups, panel, panel]."""
        corners = torch.stack([part.hessian[panel, panel].cpu() for part, _ in self._parts])
        return corners / self._prices[:, panel, None]

    def sweeps(self, count: int) -> float:
        """Sweep so often, or until nothing changes; return by how much the loss fell."""
        gained = 0.0
        for _ in range(count):
            more = self.sweep()
            if not more:
                break
            gained += more
        return gained

    def run(
        self, count: int, relaxed: Container[int] = (), thresholds: Thresholds | None = None
    ) -> None:
        """Sweep so often, or until nothing changes.  The best there has been is kept.

        relaxed: sweeps by number, from 0 and never the last, that `relax`.  Columns without codes
        have none to go back to, so that the loss may rise in the sweep that follows.
        thresholds: reserved entries move before all sweeps but the first, until they lower nothing.
        """
        best, number, still = None, 0, False
        while number < count:
            if number in relaxed:
                best, still = self._better(best), False
                self.relax()
                number += 1
                self.sweep(guarded=False)
            elif thresholds is not None and number:
                thresholds, still = (thresholds if self._threshold(thresholds) else None), False
            elif not still:
                still = not self.sweep()
            number += 1
        if best is not None and best.loss < self.objective():
            self._restore(best)

    def hold(self) -> None:
        """Keep all levels from now on."""
        self._held = True
        self.quantizer.hold()

    def relax(self) -> None:
        """Let every column be where it is best, without codes, one after the other."""
        for panel, ratios in zip(self._panels, self._ratios, strict=True):
            moved = self._best(panel).sub_(self.found[panel])
            for (_, rows), ratio in zip(self._parts, ratios, strict=True):
                own = moved[:, rows]
                # each column has moved by what it asked for, less what those before it have done
                own.copy_(torch.linalg.solve_triangular(ratio.tril(), own, upper=False))
            self.found[panel] += moved
            self._missed[panel] += moved.to(self._device)
        self._swept = True

    def _better(self, best: _Kept | None = None) -> _Kept:
        """Return the better of a state and the present one."""
        loss = self.objective()
        if best is not None and best.loss <= loss:
            return best
        return _Kept(loss, self._coded.clone(), self._places)

    def _restore(self, kept: _Kept) -> None:
        """Go back to a state: its columns, coded again, have the codes that they had."""
        self._coded.copy_(kept.coded)
        if self._places is not kept.places:
            self._reserve(kept.places)
        self._move(self._recoded(kept.coded))

    def _move(self, found: Tensor) -> None:
        """Take note of other stored columns: [in, out]."""
        self._missed += (found - self.found).to(self._device)
        self.found.copy_(found)
        self._swept = False

    def _recoded(self, values: Tensor) -> Tensor:
        """Code columns as they are given; return what is stored: both [in, out]."""
        recode(self.quantizer, self.system.order.numpy(), values.numpy())
        return self.quantizer.payload().dequantize().t().index_select(0, self.system.order)

    def _reserve(self, places: Tensor | None) -> None:
        """Reserve entries: [in, out] bool, columns in visiting order; None for those planned."""
        self._places = places
        back = torch.argsort(self.system.order)
        self.quantizer.reserve(None if places is None else places[back])

    def _threshold(self, thresholds: Thresholds) -> bool:
        """Move reserved entries, and sweep; undo both unless the loss is lower, and tell."""
        before = self._better()
        # a column that has been reserved as a whole has no levels before they are fitted
        self.quantizer.hold(self._held or not thresholds.whole_columns)
        self._reserve(thresholds.largest(self._scores(thresholds)))
        self._move(self._recoded(self.found))
        self.quantizer.hold(self._held)
        self.sweep(guarded=False)
        if self.objective() < before.loss:
            return True
        self._restore(before)
        return False

    def _scores(self, thresholds: Thresholds) -> Tensor:
        """Return how much each entry should be reserved: [in, out] float32, none negative.

        With q an entry's level, and v what a step of the gradient makes of what is stored of it,
        that is |v - q|, and the loss H_jj (v - q)^2 where v is best for the entry alone.
        """
        self._reserve(torch.zeros(self.found.shape, dtype=torch.bool))
        levels = self._recoded(self.found)
        scores = self.slope()
        for (part, rows), price in zip(self._parts, self._prices, strict=True):
            own, steps = scores[:, rows], price[:, None]
            if thresholds.by_matrix:
                steps = torch.full_like(steps, largest_eigenvalue(part.hessian))
            own.copy_(self.found[:, rows] - levels[:, rows] - own / steps)
            if not thresholds.by_matrix:
                own.square_().mul_(steps).mul_(self.importance[rows])
            own[part.dead[part.order]] = 0.0
        return scores.abs_()

    def sweep(self, *, guarded: bool = True) -> float:
        """Code every column once more; return by how much the loss fell.

        guarded: a column keeps its codes where new ones are no nearer.
        """
        gained = 0.0
        weights = self.importance if guarded else torch.zeros_like(self.importance)
        for panel, ratios in zip(self._panels, self._ratios, strict=True):
            best = self._best(panel)
            for block in bands(len(best), self._block_size):
                gained += self._descend(panel, block, best, ratios, weights.numpy())
                later, moved = slice(block.stop, None), best[block]
                for (part, rows), ratio in zip(self._parts, ratios, strict=True):
                    across = product(ratio[later, block], moved[:, rows], wide=part.wide)
                    best[later, rows] -= across
            self._missed[panel] += best.to(self._device)  # by now, how far the columns have moved
        self._swept = True
        return gained

    def _descend(
        self,
        panel: slice,
        block: slice,
        best: Tensor,
        ratios: Tensor,
        weights: NDArray[np.float32],
    ) -> float:
        """Code a block of a panel's columns again, one after the other; see `_descend`."""
        return _descend(
            self.quantizer,
            self.system.order[panel][block].numpy(),
            best[block].numpy(),
            ratios[:, block, block].contiguous().numpy(),
            self._prices[:, panel][:, block].contiguous().numpy(),
            self.found[panel][block].numpy(),
            self._coded[panel][block].numpy(),
            weights,
        )

    def _best(self, panel: slice) -> Tensor:
        """Return where each column is best while all others stay: [panel, out].

        A sweep asks for its panels one after the other, and keeps what the earlier ones say.
        """
        best = self._product(panel, slice(0, panel.start))
        self._earlier[panel] = best
        best += self._product(panel, slice(panel.start, None))
        for (_, rows), wanted in zip(self._parts, self._wanted, strict=True):
            if wanted is not None:
                best[:, rows] -= wanted[panel]
        best = best.cpu()
        for (part, rows), price in zip(self._parts, self._prices, strict=True):
            own = best[:, rows]
            exact = self.found[panel, rows], own, price[panel, None]
            own.copy_(torch.addcdiv(*(map(Tensor.double, exact) if part.wide else exact), value=-1))
        return best

    def _product(self, panel: slice, columns: slice) -> Tensor:
        """Return what some columns are of (D H) in a panel: [panel, out]."""
        found = torch.zeros_like(self._missed[panel])
        for part, rows in self._parts:
            missed = self._missed[columns, rows]
            found[:, rows] = product(part.hessian[panel, columns], missed, wide=part.wide)
        return found

    def slope(self) -> Tensor:
        """Return half of how the loss grows with the stored values: [in, out]."""
        slope = torch.cat([self._product(panel, slice(None)) for panel in self._panels])
        for (_, rows), wanted in zip(self._parts, self._wanted, strict=True):
            if wanted is not None:
                slope[:, rows] -= wanted
        return slope.cpu()

    def settle(self, levels: Tensor, found: Tensor) -> None:
        """Take other levels for the codes as they are, and keep them from now on.

        levels: see `ColumnQuantizer.settle`.  found: [in, out] float32, what is stored then.
        """
        self.quantizer.settle(levels)
        self._move(found)
        self._coded.copy_(found)  # a column goes back to its levels when it is coded to them

    def loss(self) -> float:
        """Return tr(D (H + diag(added)) D^T) without dead columns."""
        total = 0.0
        for panel, terms in self._losses():
            for part, rows in self._parts:
                terms[part.dead[part.order[panel]], rows] = 0.0
            total += float(terms.sum(dtype=torch.float64))
        return total

    def objective(self) -> float:
        """Return what sweeps lower, but for a constant.

        tr(G D (H + diag(added)) D^T), with G the importance of the rows, less what an asymmetric
        solver wants of D.
        """
        total = 0.0
        for panel, terms in self._losses():
            for (_, rows), wanted in zip(self._parts, self._wanted, strict=True):
                if wanted is not None:
                    terms[:, rows] -= (2 * wanted[panel] * self._missed[panel, rows]).cpu()
            total += float((terms.sum(dim=0, dtype=torch.float64) * self.importance).sum())
        return total

    def _losses(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield terms whose sum over a row is its D (H + diag(added)) D^T: [panel, out] each.

        What a sweep has kept of two panels counts twice, once for each of them.
        """
        for panel in self._panels:
            if not self._swept:
                self._earlier[panel] = self._product(panel, slice(0, panel.start))
            terms = self._product(panel, panel).add_(self._earlier[panel], alpha=2)
            yield panel, terms.mul_(self._missed[panel]).cpu()
        self._swept = True


def _descend(
    quantizer: ColumnQuantizer,
    columns: NDArray[np.int64],
    values: NDArray[np.float32],
    ratios: NDArray[np.float32],
    prices: NDArray[np.float32],
    found: NDArray[np.float32],
    coded: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> float:
    """Code the columns of a block again: `descend_block`, in Python where a codebook is.

    ratios: [groups, block, block], of each group of rows.  prices: [groups, block], its H_pp.
    Returns by how much the loss fell.
    """
    task = quantizer.compiled()
    if task is not None and len(ratios) == 1:
        gains = descend_block(values, ratios[0], columns, task, found, coded, weights)
        return float(gains @ prices[0].astype(np.float64))
    if task is not None:
        return float(
            descend_block_of_groups(
                values, ratios, prices, columns, task, found, coded, weights
            ).sum()
        )
    gained = 0.0
    groups = np.split(values, len(ratios), axis=1)
    each = len(weights) // len(ratios)
    for position, column in enumerate(columns.tolist()):
        for own, ratio in zip(groups, ratios, strict=True):
            compensate(own, ratio, position)
        current, kept = values[position], found[position]
        stored = quantizer.code_column(column, current)
        gain = closer(current, kept, stored, weights * np.repeat(prices[:, position], each))
        if gain >= 0:
            gained, coded[position] = gained + gain, current
        else:
            stored = quantizer.code_column(column, coded[position])
        current[:] = stored - kept
        kept[:] = stored
    return gained
