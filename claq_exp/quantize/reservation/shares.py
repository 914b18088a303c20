"""Whole counts from fractional shares."""

from __future__ import annotations

import torch
from torch import Tensor

from claq_exp.errors import ConfigError


def check_ratio(ratio: float) -> None:
    """Raise ConfigError unless 0 <= ratio <= 1."""
    if not 0 <= ratio <= 1:
        raise ConfigError(
            f"reservation.ratio is {ratio}; give the share of entries to keep, from 0 to 1 "
            "(e.g. 0.01)"
        )


def counts_from_shares(shares: Tensor, total: int, limit: int) -> Tensor:
    """Split `total` entries over columns by largest remainder, ties to the lower index.

    shares: [in] float64, non-negative.  Returns [in] int64 in proportion to them that adds up to
    `total`, no count above `limit`.
    """
    if not 0 <= total <= limit * len(shares):
        raise ValueError(f"{total} entries do not fit {len(shares)} columns of {limit}")
    counts = torch.zeros(len(shares), dtype=torch.int64)
    while (missing := total - int(counts.sum())) > 0:
        open_shares = torch.where(counts < limit, shares.clamp(min=1e-300), 0.0)
        quota = missing * (open_shares / open_shares.sum())
        step = torch.minimum(quota.floor().long(), limit - counts)
        if int(step.sum()) == 0:
            take = torch.argsort(quota, descending=True, stable=True)[:missing]
            step[take] = 1
            step = torch.minimum(step, limit - counts)
        counts += step
    return counts
