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


@dataclass(frozen=True, kw_only=True)
class ColumnSystem(Prepared):
    """How the columns of a matrix are visited and compensated.

    inverse_factor: [in, in] float32 upper triangular U with U^T U = inverse of the damped Hessian,
        rows and columns in visiting order; None without compensation.
    block_size: columns between two updates of all later columns.
    """

    inverse_factor: Tensor | None
    block_size: int


def quantize_columns(weight: Tensor, system: ColumnSystem, quantizer: ColumnQuantizer) -> float:
    """Quantize column after column, spreading each column's error over the columns that follow.

    weight: [out, in] float32.  quantizer: keeps what is found.
    With e_j = (w_j - q_j) / U_jj, every later column k becomes w_k - U_jk e_j (GPTQ, arXiv
    2210.17323, eq. 3 and Algorithm 1).  A column gathers the errors inside its block when its turn
    comes; a finished block's errors reach the next block at once and those behind it while the next
    is being quantized.  Returns the sum of e_j^2 over all rows and columns, dead ones left
    out, which is tr(D H D^T) of the damped Hessian under GPTQ.
    """
    order, dead = system.order.numpy(), system.dead[system.order]
    work = weight.t().index_select(0, system.order)  # a column is one stretch
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
