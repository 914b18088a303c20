"""Sets of levels that codebooks choose from, so that an index says which level is meant."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from claq_exp.errors import ConfigError, check_choice

APOT, GRID = "apot", "grid"
LEVEL_SETS = (APOT, GRID)
LEAST, MOST = 6, 8  # bits of an index
TERMS = {  # bits of an index -> exponents that each of four terms may have, beside being 0
    6: ((0, 2, 4), (1,), (3,), (5,)),
    7: ((0, 1, 2), (3,), (4,), (5, 6, 7)),
    8: ((0, 1, 2), (3,), (4, 5, 6), (7, 8, 9)),
}


def check_level_set(name: str, bits: int) -> None:
    """Raise ConfigError for a set that there is not."""
    check_choice("snap", name, LEVEL_SETS)
    if not LEAST <= bits <= MOST:
        raise ConfigError(f"snap_bits is {bits}; give a whole number from {LEAST} to {MOST}")


@cache
def level_set(name: str, bits: int) -> Tensor:
    """Return the levels of a set, ascending from -1 to 1: [at most 2**bits] float32.

    apot: plus or minus a sum of four terms, each 0 or a power of two of its own (DFSQ, arXiv
    2305.05888; APoT, arXiv 1909.13144), over the largest sum.  No power is in two terms, so that
    sums differ; with 0 there are 2**bits - 1.
    grid: 2**bits levels at equal distances.
    """
    if name == GRID:
        return torch.linspace(-1, 1, 2**bits, dtype=torch.float64).float()
    sums = torch.zeros(1, dtype=torch.float64)
    for exponents in TERMS[bits]:
        term = torch.tensor([0.0, *(2.0**-exponent for exponent in exponents)])
        sums = (sums[:, None] + term.double()).flatten()
    levels = torch.cat([-sums, sums]).unique() / sums.max()
    return levels.float()
