"""Whole counts from fractional shares, and the names of the ways to pick the entries."""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDE, TAILS = "magnitude", "tails"
SELECTIONS = (MAGNITUDE, TAILS)


def counts_from_shares(shares: Tensor, total: int, limit: int) -> Tensor:
    """Split `total` entries over columns by largest remainder, ties to the lower index.

    shares: [in] float64, non-negative.  Returns [in] int64 in proportion to them that adds up to
    `total`, no count above `limit`.
    """
    if not 0 <= total <= limit * len(shares):
        raise ValueError(f"{total} entries do not fit {len(shares)} columns of {limit}")
    counts = torch.full((len(shares),), limit, dtype=torch.int64)
    unfilled = torch.ones(len(shares), dtype=torch.bool)
    while unfilled.any():
        left_over = total - limit * int((~unfilled).sum())
        open_shares = torch.where(unfilled, shares.clamp(min=1e-300), 0.0)
        quota = left_over * (open_shares / open_shares.sum())
        overfull = unfilled & (quota > limit)
        if not overfull.any():
            counts[unfilled] = quota[unfilled].floor().long()
            remainder = torch.where(unfilled, quota - quota.floor(), -1.0)
            missing = total - int(counts.sum())
            counts[torch.argsort(remainder, descending=True, stable=True)[:missing]] += 1
            break
        unfilled &= ~overfull
    return counts
