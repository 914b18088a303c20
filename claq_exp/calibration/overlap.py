"""Passages that calibration and evaluation share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

PASSAGE = 32  # tokens: longer than set phrases, shorter than a paragraph
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token's bits are lost


def shared_share(windows: Tensor, calibration: Tensor) -> float:
    """Return the share of tokens that lie in a passage of 32 tokens which calibration has too.

    Both [n, seqlen] int64, of one tokenizer; passages do not cross windows.  They are compared by
    64-bit hashes, so that a false match among millions is next to impossible.
    """
    if min(windows.shape[1], calibration.shape[1]) < PASSAGE:
        return 0.0
    # by sorting: numpy 2.0 overflows where it looks at the range of such numbers for a table
    known = np.isin(_hashes(windows), _hashes(calibration), kind="sort")
    covered = np.zeros(tuple(windows.shape), dtype=bool)
    for offset in range(PASSAGE):
        covered[:, offset : offset + known.shape[1]] |= known
    return float(covered.mean())


def _hashes(windows: Tensor) -> NDArray[np.uint64]:
    """Return a hash of the passage at each place: [n, seqlen - 31]."""
    tokens = windows.numpy().astype(np.uint64) + np.uint64(1)
    places = tokens.shape[1] - PASSAGE + 1
    hashes = np.zeros((len(tokens), places), dtype=np.uint64)
    for offset in range(PASSAGE):
        hashes = (hashes + tokens[:, offset : offset + places]) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes
