"""The column loop that every solver shares."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from claq_exp.quantize.codebook import ColumnQuantizer


@dataclass(frozen=True)
class ColumnSystem:
    """How the columns of a matrix are visited and compensated.

    order: [in] int64, the visiting order.
    inverse_factor: [in, in] float32 upper triangular U with U^T U = inverse of the damped Hessian,
        rows and columns in visiting order; None without compensation.
    distortion_weight: [in] float32, layer loss per squared error of a column, columns in the
        matrix's own order.
    damping: share of the mean diagonal that was added to the diagonal; None without compensation.
    added: [in] float64, what was added to the diagonal in all, columns in the matrix's own order.
    dead: [in] bool, inputs that were zero on every calibration token.
    block_size: columns between two updates of all later columns.
    raised: the damping had to be larger than what was asked for.
    nearest: why nothing is compensated although it was asked for: "unfed", all inputs are dead, or
        "indefinite", no damping was enough; else empty.
    """

    order: Tensor
    inverse_factor: Tensor | None
    distortion_weight: Tensor
    damping: float | None
    added: Tensor
    dead: Tensor
    block_size: int
    raised: bool = False
    nearest: str = ""

    def cpu(self) -> ColumnSystem:
        """Return the same on the CPU."""
        factor = self.inverse_factor
        return replace(
            self,
            order=self.order.cpu(),
            inverse_factor=None if factor is None else factor.cpu(),
            distortion_weight=self.distortion_weight.cpu(),
            added=self.added.cpu(),
            dead=self.dead.cpu(),
        )


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
            quantizer.quantize_block(order[start:stop], errors.numpy(), inside.contiguous().numpy())
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


def _spread(later: Tensor, across: Tensor, errors: Tensor) -> None:
    """Take a block's errors [block, out] from later columns [n, out], across [block, n] each."""
    later.addmm_(across.t(), errors, alpha=-1)
