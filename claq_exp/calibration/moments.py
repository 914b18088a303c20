"""Sums what a solver must know of a layer's inputs, over calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress

import torch
from torch import Tensor

from claq_exp.errors import CalibrationError
from claq_exp.quantize.moments import CROSS, OUTPUT_GRADIENTS, Moments
from claq_exp.quantize.symmetric import BAND, bands, mirror_
from claq_exp.system.accelerator import free_and_total, is_cpu

TOKENS = 2048  # that are multiplied at a time
SHARE = 1 / 8  # of a device's free memory: the others of a block, and the next batch, take some
GPU_BAND = 1024  # rows of a product there: a GPU is idle in narrow ones


class MomentsAccumulator:
    """Sums x x^T over tokens: products of some in float32, the sum of products in float64.

    Products of inputs in float64 are in float64; a solver then computes in float64 too.

    One matrix [in, in] float64 for each group of rows is all that it holds, and as much again for
    the cross moment where that is wanted; of a Hessian the half above the diagonal is summed.  They
    lie where the tokens do, or on the CPU where a device has no memory for them.

    columns: in.  wants: see `claq_exp.quantize.solver.base.Solver`.  groups: of rows.
    """

    def __init__(self, columns: int, wants: Collection[str] = (), groups: int = 1) -> None:
        if groups > 1 and OUTPUT_GRADIENTS not in wants:
            raise ValueError(f"{groups} groups of rows for a solver that wants one")
        self._weighted = OUTPUT_GRADIENTS in wants
        self._sums = _zeros(groups, columns, torch.device("cpu"))
        self._cross = _zeros(groups, columns, torch.device("cpu")) if CROSS in wants else None
        self._tokens = 0
        self._wide = False
        self._moments: Moments | None = None

    def add(
        self,
        student: Tensor,
        teacher: Tensor | None = None,
        *,
        where: str,
        weights: Tensor | None = None,
    ) -> None:
        """Add a batch: [..., in], any float dtype and device.

        student: what enters the layer in the quantized model so far.
        teacher: what enters it in the original, of the same shape; where the cross moment is
            wanted.
        weights: [..., groups], what an error in the outputs of each group of rows weighs at each
            token; where output gradients are wanted.
        Raises CalibrationError that names `where` when a value is not finite, or its square is
        not; nothing of the batch is added then.
        """
        if self._moments is not None:
            raise ValueError("the moments are finished and take no more tokens")
        if (teacher is None) != (self._cross is None):
            raise ValueError("a teacher's inputs belong to the cross moment; give both or neither")
        if teacher is not None and teacher.shape != student.shape:
            raise ValueError(f"teacher's inputs are {tuple(teacher.shape)}, {tuple(student.shape)}")
        if (weights is None) == self._weighted:
            raise ValueError("weights belong to output gradients; give both or neither")
        inputs = _flat(student)
        original = None if teacher is None else _flat(teacher)
        weighing = None if weights is None else _flat(weights)
        _check_finite([part for part in (inputs, original, weighing) if part is not None], where)
        if not self._tokens:
            self._settle(student.device)
        self._wide = self._wide or inputs.dtype == torch.float64
        for start in range(0, len(inputs), TOKENS):
            some = slice(start, start + TOKENS)
            self._add(_summed(inputs[some]), _taken(original, some), _taken(weighing, some))
        self._tokens += len(inputs)

    def _add(self, student: Tensor, teacher: Tensor | None, weights: Tensor | None) -> None:
        """Add some tokens: [tokens, in] float32 or float64 each, weights [tokens, groups]."""
        width = BAND if is_cpu(student.device) else GPU_BAND
        for group in range(len(self._sums)):
            mine = student if weights is None else student * weights[:, group, None]
            for band in bands(student.shape[1], width):
                product = mine[:, band].t() @ student[:, band.start :]
                self._sums[group, band, band.start :] += product.to(self._sums.device)
            if self._cross is None or teacher is None:
                continue
            for band in bands(student.shape[1], width):
                product = (teacher[:, band] - student[:, band]).t() @ mine
                self._cross[group, band] += product.to(self._cross.device)

    def _settle(self, device: torch.device) -> None:
        """Have the sums on the device of the tokens, where they take little of what is free."""
        needed = self._sums.nbytes * (1 if self._cross is None else 2)
        if device == self._sums.device or needed > SHARE * free_and_total(device)[0]:
            return
        groups, columns, _ = self._sums.shape
        with suppress(torch.OutOfMemoryError):
            sums = _zeros(groups, columns, device)
            if self._cross is not None:
                self._cross = _zeros(groups, columns, device)
            self._sums = sums

    def combine(self, sum_: Callable[[Tensor], None]) -> None:
        """Take in what other processes have added.  sum_: replaces a tensor by its sum over all."""
        seen = torch.tensor([self._tokens, self._wide])
        sum_(self._sums)
        if self._cross is not None:
            sum_(self._cross)
        sum_(seen)
        self._tokens, self._wide = int(seen[0]), bool(seen[1])  # a rank may have seen none

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return self._tokens

    def moments(self) -> Moments:
        """Return the moments; no token can be added any more.

        They lie on the CPU, in the accumulator's own memory, and are disposable.
        """
        if self._moments is None:
            scale = 2.0 / max(self._tokens, 1)
            with torch.inference_mode(False):
                hessian = self._sums.cpu()
                cross = None if self._cross is None else self._cross.cpu()
            hessian *= scale
            for group in hessian:
                mirror_(group)
            if cross is not None:
                cross *= scale
            self._sums, self._cross = hessian.new_empty(1, 0, 0), None
            self._moments = Moments(hessian, cross, self._tokens, disposable=True, wide=self._wide)
        return self._moments


def _flat(batch: Tensor) -> Tensor:
    return batch.reshape(-1, batch.shape[-1])


def _taken(tokens: Tensor | None, some: slice) -> Tensor | None:
    return None if tokens is None else _summed(tokens[some])


def _summed(tokens: Tensor) -> Tensor:
    """Return tokens in the type of their products: float64 stays, all else is float32."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def _check_finite(batches: list[Tensor], where: str) -> None:
    """Raise CalibrationError unless all numbers of [tokens, any] tensors have finite squares."""
    norms = [
        torch.linalg.vector_norm(part.float(), dim=0)
        for batch in batches
        for part in batch.split(TOKENS)
    ]
    if not torch.isfinite(torch.cat(norms)).all():  # the one time that a device is waited for
        raise CalibrationError(
            f"the input of {where} holds NaN or infinite values; check the model's weights "
            "and model.dtype"
        )


def _zeros(groups: int, columns: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what takes over the moments may work in their place
        return torch.zeros(groups, columns, columns, dtype=torch.float64, device=device)
