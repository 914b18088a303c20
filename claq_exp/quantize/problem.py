"""What a solver is asked: one weight matrix and what is known of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import NumericalError
from claq_exp.quantize.layout import HALF_MAX


@dataclass(frozen=True)
class LinearProblem:
    """One linear layer to quantize.

    weight: [out, in] float32.
    hessian: [in, in] float64, 2/n * sum over n tokens of x x^T (GPTQ, arXiv 2210.17323, eq. 1-2).
    name: full name of the layer in its model; empty when unknown.
    """

    weight: Tensor
    hessian: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        columns = self.weight.shape[1]
        if tuple(self.hessian.shape) != (columns, columns):
            raise ValueError(
                f"hessian is {tuple(self.hessian.shape)}, weight has {columns} columns"
            )
        where = f"{self.name}: " if self.name else ""
        fits = self.weight.abs() <= HALF_MAX
        if not fits.all():
            row, column = torch.nonzero(~fits)[0].tolist()
            value = self.weight[row, column].item()
            raise NumericalError(
                f"{where}weight[{row}, {column}] is {value:.6g}, beyond float16 in which levels "
                "and outliers are stored; repair or rescale the model's weights"
            )
        if not torch.isfinite(self.hessian).all():
            raise NumericalError(f"{where}the Hessian is not finite; check the calibration inputs")
