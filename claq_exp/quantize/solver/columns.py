"""The column loop on the CPU."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.quantize.codebook.base import ColumnQuantizer
from claq_exp.quantize.solver.base import Prepared
from claq_exp.quantize.solver.compiled import compensate, quantize_block
from claq_exp.quantize.symmetric import bands

SHIFTED = 256  # columns that are moved at a time


@dataclass(frozen=True, kw_only=True)
class ColumnSystem(Prepared):
    """How the columns of a matrix are visited and compensated.

    inverse_factor: [in, in] float32 upper triangular U with U^T U = inverse of the damped Hessian,
        rows and columns in visiting order; None without compensation.
    block_size: columns between two updates of all later columns.
    correction: [in, in] float32 strictly upper triangular P, rows and columns in visiting order:
        what a weight of column j adds to the columns behind it, P[j, k] each, so that they make up
        for what its input has lost in the quantized model; None where nothing is made up for.
    """

    inverse_factor: Tensor | None
    block_size: int
    correction: Tensor | None = None


def quantize_columns(weight: Tensor, system: ColumnSystem, quantizer: ColumnQuantizer) -> float:
    """Quantize column after column, spreading each column's error over the columns that follow.

    weight: [out, in] float32.  quantizer: keeps what is found.
    With e_j = (w_j - q_j) / U_jj, every later column k becomes w_k - U_jk e_j (GPTQ, arXiv
    2210.17323, eq. 3 and Algorithm 1).  A column gathers the errors inside its block when its turn
    comes; a finished block's errors reach the next block at once and those behind it while the next
    is being quantized.  Where the system has a correction, the loop starts from `shift_`ed columns.
    Returns the sum of e_j^2 over all rows and columns, dead ones left out.  Under GPTQ that is
    tr(D H D^T) of the damped Hessian, D the difference to the columns that the loop starts from.
    """
    order, dead = system.order.numpy(), system.dead[system.order]
    work = weight.t().index_select(0, system.order)  # a column is one stretch
    if system.correction is not None:
        shift_(work, system.correction)
    factor, step = system.inverse_factor, system.block_size
    behind: Future[None] | None = None
    loss = 0.0
    threads = torch.get_num_threads()  # a new thread would take all cores, whatever is asked for
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as helper:
        for start in range(0, len(order), step):
            stop = min(start + step, len(order))
            errors = work[start:stop]
            inside = torch.zeros(0, 0) if factor is None else factor[start:stop, start:stop].t()
            _quantize_block(
                quantizer, order[start:stop], errors.numpy(), inside.contiguous().numpy()
            )
            errors[dead[start:stop]] = 0.0  # of any size, and no other column depends on them
            loss += float(errors.square().sum(dtype=torch.float64))
            if behind is not None:
                behind.result()
            if factor is not None and stop < len(order):
                following = min(stop + step, len(order))
                _spread(work[stop:following], factor[start:stop, stop:following], errors)
                behind = helper.submit(
                    _spread, work[following:], factor[start:stop, following:], errors
                )
    return loss


def shift_(work: Tensor, correction: Tensor) -> None:
    """Replace the columns of W by those of W + W P, in visiting order.

    work: [in, out] float32, W transposed.  correction: P, see `ColumnSystem`.
    GPTAQ adds w_j P[j, k] to every later column k when it has quantized column j.  What is added
    depends on no code, so that all of it can be added before the first column is quantized, and
    the loop itself is GPTQ's on any device.  The last columns come first: the others are then still
    those of W.
    """
    for band in reversed(list(bands(len(work), SHIFTED))):
        work[band] += correction[: band.stop, band].t() @ work[: band.stop]


def damped_loss(difference: Tensor, system: ColumnSystem) -> float:
    """Return tr(D (H + diag(added)) D^T) without dead columns, from the inverse factor alone.

    difference: [out, in] float32, columns in the matrix's own order.
    With U^T U = H^-1 it is |D U^-1|^2.
    """
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
) -> None:
    """Quantize the columns of a block: `quantize_block`, in Python where a codebook is."""
    task = quantizer.compiled()
    if task is not None:
        quantize_block(values, lower, columns, task)
        return
    for position, column in enumerate(columns.tolist()):
        if len(lower):
            compensate(values, lower, position)
        current = values[position]
        current -= quantizer.code_column(column, current)
        current /= lower[position, position] if len(lower) else 1.0


def _spread(later: Tensor, across: Tensor, errors: Tensor) -> None:
    """Take a block's errors [block, out] from later columns [n, out], across [block, n] each."""
    later.addmm_(across.t(), errors, alpha=-1)
