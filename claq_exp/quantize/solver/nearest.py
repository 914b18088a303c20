"""No compensation: every weight goes to its nearest level."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from claq_exp.quantize.moments import Moments
from claq_exp.quantize.solver.column_loop import ColumnLoop
from claq_exp.quantize.solver.columns import ColumnSystem


@dataclass(frozen=True)
class Nearest(ColumnLoop):
    """Quantize each column for itself (round to nearest)."""

    def prepare(self, moments: Moments) -> ColumnSystem:
        """Visit the columns as they stand; an error in column j costs H_jj."""
        diagonal = moments.single().diagonal().clone()
        return ColumnSystem(
            order=torch.arange(len(diagonal), device=diagonal.device),
            inverse_factor=None,
            distortion_weight=diagonal.float(),
            added=torch.zeros_like(diagonal),
            dead=diagonal == 0,
            block_size=len(diagonal),
            diagonal=diagonal.float(),
        )
