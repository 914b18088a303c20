"""Training what a checkpoint keeps in 16 bits, once the matrices of a block are quantized."""

from __future__ import annotations

from claq_exp.train.norms import Norms
from claq_exp.train.window import NoTuning

TUNE: dict[str, type] = {"none": NoTuning, "norms": Norms}
