"""The column loop on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.quantize.codebook.base import ColumnQuantizer
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.solver.base import Prepared
from claq_exp.quantize.solver.compiled import (
    compensate,
    quantize_block,
    quantize_block_of_groups,
)
from claq_exp.quantize.statistics import ColumnStatistics
from claq_exp.quantize.symmetric import bands, product

SHIFTED = 256  # columns that are moved at a time
NOTHING = np.zeros((0, 0), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class ColumnSystem(Prepared):
    """How the columns of a matrix are visited and compensated.

    inverse_factor: [in, in] float32 upper triangular U with U^T U = inverse of the damped Hessian,
        rows and columns in visiting order; None without compensation.
    block_size: columns between two updates of all later columns.
    wide: products of the columns are summed in float64.
    correction: [in, in] float32 strictly upper triangular P, rows and columns in visiting order:
        what a weight of column j adds to the columns behind it, P[j, k] each, so that they make up
        for what its input has lost in the quantized model; None where nothing is made up for.
    """

    inverse_factor: Tensor | None
    block_size: int
    wide: bool = False
    correction: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class GroupedSystem(Prepared):
    """What was prepared for groups of neighbouring rows, in equal numbers.

    Columns are visited in one order for all, so that a codebook can be fitted to all rows of one.
    What is said of all rows is a mean over groups.
    parts: of each group.
    group_shares: [groups, in] float32, see `ColumnStatistics`.
    """

    parts: tuple[ColumnSystem, ...]
    group_shares: Tensor

    @staticmethod
    def of(parts: Sequence[ColumnSystem]) -> GroupedSystem:
        """Put groups together, which were prepared in one order."""
        weights = torch.stack([part.distortion_weight for part in parts])
        mean = weights.mean(dim=0)
        diagonals = [part.diagonal for part in parts if part.diagonal is not None]
        return GroupedSystem(
            order=parts[0].order,
            distortion_weight=mean,
            dead=torch.stack([part.dead for part in parts]).all(dim=0),
            added=torch.stack([part.added for part in parts]).mean(dim=0),
            damping=max(part.damping or 0.0 for part in parts),
            raised=any(part.raised for part in parts),
            nearest=parts[0].nearest if all(part.nearest for part in parts) else "",
            diagonal=torch.stack(diagonals).mean(dim=0) if len(diagonals) == len(parts) else None,
            parts=tuple(parts),
            group_shares=weights / mean,
        )

    def cpu(self) -> GroupedSystem:
        """Return the same on the CPU."""
        return replace(super().cpu(), parts=tuple(part.cpu() for part in self.parts))

    def statistics(
        self, problem: LinearProblem, row_weights: Tensor | None = None
    ) -> ColumnStatistics:
        """Return what the other strategies may know of a matrix, see `Prepared`.

        What a group as a whole matters is in its Hessian, and is taken out of the weights of rows.
        """
        if row_weights is not None:
            groups = row_weights.view(len(self.parts), -1)
            row_weights = (groups / groups.mean(dim=1, keepdim=True)).view(-1)
        found = super().statistics(problem, row_weights)
        return replace(found, group_shares=self.group_shares)

    def excess(self, difference: Tensor) -> float:
        """Return what damping adds to the loss of a difference, see `Prepared`."""
        own = zip(self.parts, difference.chunk(len(self.parts)), strict=True)
        return sum(part.excess(rows) for part, rows in own)


def parts_of(system: ColumnSystem | GroupedSystem, rows: int) -> list[tuple[ColumnSystem, slice]]:
    """Return the systems of groups of rows, and which rows of so many those are."""
    parts = system.parts if isinstance(system, GroupedSystem) else (system,)
    size = rows // len(parts)
    return [(part, slice(at * size, (at + 1) * size)) for at, part in enumerate(parts)]


def quantize_columns(
    weight: Tensor,
    system: ColumnSystem | GroupedSystem,
    quantizer: ColumnQuantizer,
    coded: Tensor | None = None,
) -> float:
    """Quantize column after column, spreading each column's error over the columns that follow.

    weight: [out, in] float32.  quantizer: keeps what is found.
    coded: [in, out] float32, overwritten by the columns as they were coded, in visiting order.
    With e_j = (w_j - q_j) / U_jj, every later column k becomes w_k - U_jk e_j (GPTQ, arXiv
    2210.17323, eq. 3 and Algorithm 1).  A column gathers the errors inside its block when its turn
    comes; a finished block's errors reach the next block at once and those behind it while the next
    is being quantized.  Where the system has a correction, the loop starts from `shift_`ed columns.
    Groups of rows are compensated each by its own system; their columns are coded together.
    Returns the sum of e_j^2 over all rows and columns, dead ones left out.  Under GPTQ that is
    tr(D H D^T) of the damped Hessian, D the difference to the columns that the loop starts from.
    """
    order, parts = system.order.numpy(), parts_of(system, len(weight))
    work = weight.t().index_select(0, system.order)  # a column is one stretch
    for part, rows in parts:
        if part.correction is not None:
            shift_(work[:, rows], part.correction, wide=part.wide)
    step = parts[0][0].block_size
    behind: Future[None] | None = None
    loss = 0.0
    threads = torch.get_num_threads()  # a new thread would take all cores, whatever is asked for
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as helper:
        for start in range(0, len(order), step):
            stop = min(start + step, len(order))
            errors = work[start:stop]
            inside = _inside(parts, slice(start, stop))
            seen = NOTHING if coded is None else coded[start:stop].numpy()
            _quantize_block(quantizer, order[start:stop], errors.numpy(), inside.numpy(), seen)
            for part, rows in parts:  # of any size, and no other column depends on them
                errors[part.dead[system.order[start:stop]], rows] = 0.0
            loss += float(errors.square().sum(dtype=torch.float64))
            if behind is not None:
                behind.result()
            following = min(stop + step, len(order))
            _spread(work, errors, parts, slice(start, stop), slice(stop, following))
            behind = helper.submit(
                _spread, work, errors, parts, slice(start, stop), slice(following, len(order))
            )
    return loss


def _inside(parts: Sequence[tuple[ColumnSystem, slice]], block: slice) -> Tensor:
    """Return the transposed factors of a block: [groups, block, block]; [1, 0, 0] without any."""
    factors = [part.inverse_factor for part, _ in parts]
    found = [factor[block, block].t() for factor in factors if factor is not None]
    return torch.stack(found) if found else torch.zeros(1, 0, 0)


def shift_(work: Tensor, correction: Tensor, *, wide: bool = False) -> None:
    """Replace the columns of W by those of W + W P, in visiting order.

    work: [in, out] float32, W transposed.  correction, wide: see `ColumnSystem`.
    GPTAQ adds w_j P[j, k] to every later column k when it has quantized column j.  What is added
    depends on no code, so that all of it can be added before the first column is quantized, and
    the loop itself is GPTQ's on any device.  The last columns come first: the others are then still
    those of W.
    """
    for band in reversed(list(bands(len(work), SHIFTED))):
        work[band] += product(correction[: band.stop, band].t(), work[: band.stop], wide=wide)


def damped_loss(difference: Tensor, system: ColumnSystem | GroupedSystem) -> float:
    """Return tr(D (H + diag(added)) D^T) without dead columns, from inverse factors alone.

    difference: [out, in] float32, columns in the matrix's own order.
    With U^T U = H^-1 it is |D U^-1|^2.
    """
    return sum(_damped_loss(difference[rows], p) for p, rows in parts_of(system, len(difference)))


def _damped_loss(difference: Tensor, system: ColumnSystem) -> float:
    if system.inverse_factor is None:
        raise ValueError("a system without compensation has no factor to tell a loss from")
    ordered = difference.index_select(1, system.order)
    ordered[:, system.dead[system.order]] = 0.0
    solved = torch.linalg.solve_triangular(system.inverse_factor, ordered, upper=True, left=False)
    return float(solved.square_().sum(dtype=torch.float64))


def _quantize_block(
    quantizer: ColumnQuantizer,
    columns: NDArray[np.int64],
    values: NDArray[np.float32],
    lower: NDArray[np.float32],
    coded: NDArray[np.float32],
) -> None:
    """Quantize the columns of a block: `quantize_block`, in Python where a codebook is.

    lower: [groups, block, block], of each group of rows.
    """
    task = quantizer.compiled()
    if task is not None and len(lower) == 1:
        quantize_block(values, lower[0], columns, task, coded)
        return
    if task is not None:
        quantize_block_of_groups(values, lower, columns, task, coded)
        return
    groups = np.split(values, len(lower), axis=1)
    for position, column in enumerate(columns.tolist()):
        for own, factor in zip(groups, lower, strict=True):
            if len(factor):
                compensate(own, factor, position)
        current = values[position]
        if len(coded):
            coded[position] = current
        current -= quantizer.code_column(column, current)
        for own, factor in zip(groups, lower, strict=True):
            own[position] /= factor[position, position] if len(factor) else 1.0


def _spread(
    work: Tensor,
    errors: Tensor,
    parts: Sequence[tuple[ColumnSystem, slice]],
    block: slice,
    later: slice,
) -> None:
    """Take a block's errors [block, out] from later columns of W, [in, out]."""
    for part, rows in parts:
        if part.inverse_factor is None or later.start >= later.stop:
            continue
        across, moving = part.inverse_factor[block, later].t(), work[later, rows]
        if not part.wide:
            moving.addmm_(across, errors[:, rows], alpha=-1)
            continue
        own = errors[:, rows].double()
        for band in bands(len(moving), SHIFTED):
            moving[band] = torch.addmm(moving[band].double(), across[band].double(), own, alpha=-1)
