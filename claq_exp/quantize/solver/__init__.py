"""Which code each weight gets, and where its error goes."""

from __future__ import annotations

from claq_exp.quantize.solver.alternating import Alternating
from claq_exp.quantize.solver.base import Solver as Solver
from claq_exp.quantize.solver.gptq import Gptq
from claq_exp.quantize.solver.nearest import Nearest
from claq_exp.quantize.solver.quantease import QuantEase

SOLVER: dict[str, type] = {
    "alternating": Alternating,
    "gptq": Gptq,
    "nearest": Nearest,
    "quantease": QuantEase,
}
