"""The second moment of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from claq_exp.errors import CalibrationError


class HessianAccumulator:
    """Sums x x^T over tokens: products of a batch in float32, the sum over batches in float64."""

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float64)
        self._tokens = 0

    def add(self, inputs: Tensor, where: str) -> None:
        """Add a batch: [..., in], any float dtype and device.

        Raises CalibrationError that names `where` when an input is not finite.
        """
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        product = flat.t() @ flat
        if not torch.isfinite(
            product.diagonal()
        ).all():  # a bad input makes its own diagonal entry bad
            raise CalibrationError(
                f"the input of {where} holds NaN or infinite values; check the model's weights "
                "and model.dtype"
            )
        self._sum += product.to("cpu", torch.float64)
        self._tokens += len(flat)

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return self._tokens

    def hessian(self) -> Tensor:
        """Return 2/n * sum over n tokens of x x^T: [in, in] float64 (GPTQ, arXiv 2210.17323)."""
        return self._sum * (2.0 / max(self._tokens, 1))
