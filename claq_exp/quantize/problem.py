"""What a solver is asked: one weight matrix and what is known of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import NumericalError
from claq_exp.payload.stored import HALF_MAX
from claq_exp.quantize.symmetric import bands, energy, is_finite


@dataclass(frozen=True)
class LinearProblem:
    """One linear layer to quantize.

    weight: [out, in] float32.
    hessian: [in, in] float64, 2/n * sum over n tokens of x x^T (GPTQ, arXiv 2210.17323, eq. 1-2);
        [groups, in, in] for groups of neighbouring rows, in equal numbers;
        None once a solver that compensates has used it up: all it must still tell is the energy.
    name: full name of the layer in its model; empty when unknown.
    known_energy: tr(W H W^T), where it is known already.
    """

    weight: Tensor
    hessian: Tensor | None
    name: str = ""
    known_energy: float | None = None

    def __post_init__(self) -> None:
        self._check_weight()
        if self.hessian is None:
            if self.known_energy is None:
                raise ValueError("a problem without its Hessian needs the energy")
            return
        columns = self.weight.shape[1]
        if self.hessian.dim() > 3 or tuple(self.hessian.shape[-2:]) != (columns, columns):
            raise ValueError(
                f"hessian is {tuple(self.hessian.shape)}, weight has {columns} columns"
            )
        if not all(map(is_finite, self._hessians)):
            raise NumericalError(
                f"{self._where}the Hessian is not finite; check the calibration inputs"
            )

    def energy(self) -> float:
        """Return tr(W H W^T), the squared output of the layer."""
        if self.known_energy is not None:
            return self.known_energy
        return self.error(self.weight)

    def error(self, difference: Tensor) -> float:
        """Return tr(D H D^T), the squared error of the outputs: [out, in] float32."""
        if self.hessian is None:
            raise ValueError("the Hessian of this problem is gone")
        rows = difference.chunk(len(self._hessians))
        return sum(energy(own, h) for own, h in zip(rows, self._hessians, strict=True))

    @property
    def _hessians(self) -> Tensor:
        """That of each group of rows: [groups, in, in]."""
        assert self.hessian is not None
        return self.hessian if self.hessian.dim() == 3 else self.hessian[None]

    @property
    def _where(self) -> str:
        return f"{self.name}: " if self.name else ""

    def _check_weight(self) -> None:
        for band in bands(len(self.weight)):
            fits = self.weight[band].abs() <= HALF_MAX
            if fits.all():
                continue
            row, column = torch.nonzero(~fits)[0].tolist()
            row += band.start
            value = self.weight[row, column].item()
            raise NumericalError(
                f"{self._where}weight[{row}, {column}] is {value:.6g}, beyond float16 in which "
                "levels and outliers are stored; repair or rescale the model's weights"
            )
