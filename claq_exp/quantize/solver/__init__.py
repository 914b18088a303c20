"""In which order columns are quantized, and where their error goes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.quantize.solver.gptq import Gptq
from claq_exp.quantize.solver.nearest import Nearest


class Solver(Protocol):
    """A rule for the column loop; what it prepares is shared by all linears with the same input."""

    def prepare(self, hessian: Tensor, overwrite: bool = False) -> ColumnSystem:
        """Turn a Hessian, [in, in] float64, into an order and a compensation.

        overwrite: the memory of the Hessian may be used for anything, if there is a compensation.
        Raises NumericalError and leaves the Hessian as it was.
        """


SOLVER: dict[str, type] = {"gptq": Gptq, "nearest": Nearest}
