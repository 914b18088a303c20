"""Token windows of equal length."""

from __future__ import annotations

import torch
from torch import Tensor

from claq_exp.errors import ConfigError


def sample_windows(tokens: Tensor, windows: int, seqlen: int, seed: int, where: str) -> Tensor:
    """Draw `windows` distinct, non-overlapping windows: [n] int64 -> [windows, seqlen] int64.

    where: the config group that a message should name.  Raises ConfigError when the text is too
    short.
    """
    candidates = _cut(tokens, windows, seqlen, where)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(candidates), generator=generator)[:windows]
    return candidates[chosen]


def first_windows(tokens: Tensor, windows: int | None, seqlen: int, where: str) -> Tensor:
    """Return the first `windows` non-overlapping windows (None: all); the rest is dropped."""
    candidates = _cut(tokens, windows or 1, seqlen, where)
    return candidates[:windows]


def _cut(tokens: Tensor, windows: int, seqlen: int, where: str) -> Tensor:
    available = len(tokens) // seqlen
    if available < windows:
        raise ConfigError(
            f"{where}: the text has {len(tokens)} tokens, i.e. {available} windows of {seqlen}, "
            f"and {windows} are "
            f"asked for; lower {where}.windows or {where}.seqlen, or give a longer text"
        )
    return tokens[: available * seqlen].reshape(available, seqlen)
