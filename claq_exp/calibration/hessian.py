"""The second moment of a layer's inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from claq_exp.accelerator import free_and_total, is_cpu
from claq_exp.errors import CalibrationError
from claq_exp.quantize.symmetric import BAND, bands, mirror_

TOKENS = 2048  # that are multiplied at a time
SHARE = 1 / 8  # of a device's free memory: the others of a block, and the next batch, take some
GPU_BAND = 1024  # rows of a product there: a GPU is idle in narrow ones


class HessianAccumulator:
    """Sums x x^T over tokens: products of some in float32, the sum of products in float64.

    One matrix [in, in] float64 is all that it holds; the half above the diagonal is summed.  It
    lies where the tokens do, or on the CPU where a device has no memory for it.
    """

    def __init__(self, columns: int) -> None:
        self._sum = _zeros(columns, torch.device("cpu"))
        self._tokens = 0
        self._finished = False

    def add(self, inputs: Tensor, where: str) -> None:
        """Add a batch: [..., in], any float dtype and device.

        Raises CalibrationError that names `where` when an input is not finite, or its square is
        not; nothing of the batch is added then.
        """
        if self._finished:
            raise ValueError("the Hessian is finished and takes no more tokens")
        tokens = inputs.reshape(-1, inputs.shape[-1])
        parts = tokens.split(TOKENS)
        norms = [torch.linalg.vector_norm(part.float(), dim=0) for part in parts]
        if not torch.isfinite(torch.stack(norms)).all():  # the one time that a device is waited for
            raise CalibrationError(
                f"the input of {where} holds NaN or infinite values; check the model's weights "
                "and model.dtype"
            )
        if not self._tokens:
            self._settle(inputs.device)
        for part in parts:
            values = part.float()
            for band in bands(len(self._sum), BAND if is_cpu(part.device) else GPU_BAND):
                product = values[:, band].t() @ values[:, band.start :]
                self._sum[band, band.start :] += product.to(self._sum.device)
        self._tokens += len(tokens)

    def _settle(self, device: torch.device) -> None:
        """Have the sum on the device of the tokens, where it takes little of what is free."""
        if device == self._sum.device or self._sum.nbytes > SHARE * free_and_total(device)[0]:
            return
        with suppress(torch.OutOfMemoryError):
            self._sum = _zeros(len(self._sum), device)

    def combine(self, sum_: Callable[[Tensor], None]) -> None:
        """Take in what other processes have added.  sum_: replaces a tensor by its sum over all."""
        tokens = torch.tensor(self._tokens)
        sum_(self._sum)
        sum_(tokens)
        self._tokens = int(tokens)

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return self._tokens

    def hessian(self) -> Tensor:
        """Return 2/n * sum over n tokens of x x^T: [in, in] float64 (GPTQ, arXiv 2210.17323).

        It lies on the CPU and is the accumulator's own memory: no token can be added any more.
        """
        if not self._finished:
            with torch.inference_mode(False):
                self._sum = self._sum.cpu()
            self._sum *= 2.0 / max(self._tokens, 1)
            mirror_(self._sum)
            self._finished = True
        return self._sum


def _zeros(columns: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what takes over the Hessian may work in its place
        return torch.zeros(columns, columns, dtype=torch.float64, device=device)
