"""Training the norms of a block, so that its output comes near the original's.

The weights and biases of normalization layers are few and stored in 16 bits anyway: training them
costs no bits.  Each block minimizes the squared difference between its output on the student's
hidden states and the original block's on the original model's (block MSE, as in OmniQuant, arXiv
2308.13137, eq. 1, and norm tweaking, arXiv 2309.02784).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from claq_exp.errors import ConfigError, NumericalError
from claq_exp.models.blocks import run_block
from claq_exp.models.discover import norms_of
from claq_exp.train.window import Cost, Tuned, Window

BACKWARD = 2.0  # forward passes that a backward pass takes
STATES = 40.0  # hidden states of a block that a backward pass keeps
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Norms:
    """Train the weights and biases of norms by Adam, on block MSE.

    steps: of Adam.  learning_rate: of the first step; it falls to zero along a line.
    batch: calibration batches of a step; all ranks share them.
    The result counts only where it lowers the error over all batches.
    """

    wants: ClassVar[frozenset[str]] = frozenset({"teacher"})

    steps: int = 16
    learning_rate: float = 1e-3
    batch: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"tune.{name} is {getattr(self, name)}; give a whole number from 1"
                )
        if not 0 < self.learning_rate < 1:
            raise ConfigError(
                f"tune.learning_rate is {self.learning_rate}; give a number between 0 and 1"
            )

    def cost(self, batches: int) -> Cost:
        """Return the passes of teacher, of both measurements, and of all steps."""
        seen = self.steps * min(self.batch, batches) / batches
        return Cost(3 + (1 + BACKWARD) * seen, STATES)

    def run(self, window: Window) -> Tuned:
        """Train a block's norms; see the class.

        Raises NumericalError where the error is not finite.
        """
        started = time.perf_counter()
        norms = norm_parameters(window.module)
        if not norms:
            return Tuned()
        before = _relative_error(window)
        if before == 0:  # there is nothing to learn
            return Tuned()
        found = self._trained(window, norms)
        found = {
            name: window.rounded(value).to(norms[name].device) for name, value in found.items()
        }
        with _holding(norms, found):
            after = _relative_error(window)
        report = {
            "tensors": len(norms),
            "error_before": before,
            "error_after": after,
            "kept": after < before,
            "seconds": time.perf_counter() - started,
        }
        return Tuned(found if after < before else {}, report)

    def _trained(self, window: Window, norms: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return name -> trained value, float32."""
        masters = {name: p.detach().float().clone() for name, p in norms.items()}
        optimizer = torch.optim.Adam(list(masters.values()), self.learning_rate, foreach=False)
        with _trainable(window.module, norms):
            for step in range(self.steps):
                optimizer.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.steps)
                first = step * self.batch
                chosen = {number % window.batches for number in range(first, first + self.batch)}
                gradients = _gradients(window, list(norms.values()), chosen)
                for master, gradient in zip(masters.values(), gradients, strict=True):
                    master.grad = gradient
                optimizer.step()
                _set(norms, masters)
        return masters


def norm_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter of the norms of a block."""
    return {
        f"{path}.{name}": parameter
        for path, module in norms_of(block).items()
        for name, parameter in module.named_parameters(recurse=False)
    }


def _gradients(
    window: Window, parameters: Sequence[nn.Parameter], chosen: set[int]
) -> list[Tensor]:
    """Return the gradients of the error over some batches, summed over ranks, float32.

    chosen: numbers of batches among those of all ranks.  Adam does not care for the scale of a
    loss: it is the mean square of a batch's targets, with which float16 gradients are in range.
    """
    sizes = [parameter.numel() for parameter in parameters]
    total = torch.zeros(sum(sizes), dtype=torch.float32)
    for batch in range(len(window.teacher)):
        if window.ranks.number(batch) not in chosen:
            continue
        with torch.enable_grad():
            scale = window.teacher[batch].float().square().mean().clamp(min=TINY)
            loss = _squares(window, batch) / scale.to(parameters[0].device)
            found = torch.autograd.grad(loss, parameters)
        total += torch.cat([gradient.reshape(-1).float().cpu() for gradient in found])
    window.ranks.sum_(total)
    pieces = total.split(sizes)
    return [
        piece.view_as(parameter).to(parameter.device)
        for piece, parameter in zip(pieces, parameters, strict=True)
    ]


@torch.no_grad()
def _relative_error(window: Window) -> float:
    """Return the squared difference of all outputs to the teacher's, over the teacher's squares."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in range(len(window.teacher)):
        sums[0] += _squares(window, batch).double().cpu()
        sums[1] += window.teacher[batch].float().square().sum().double().cpu()
    window.ranks.sum_(sums)
    if not torch.isfinite(sums).all():
        raise NumericalError("the outputs of a block are not finite; check model.dtype")
    error, squares = sums.tolist()
    return error / squares if squares else 0.0


def _squares(window: Window, batch: int) -> Tensor:
    output = run_block(window.module, window.inputs, batch)
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    return (output - window.teacher[batch].to(output)).square().sum()


@contextmanager
def _trainable(block: nn.Module, chosen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Take all other parameters out of the backward pass; afterwards all are as they were."""
    asked = {parameter: parameter.requires_grad for parameter in block.parameters()}
    before = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    for parameter in asked:
        parameter.requires_grad_(any(parameter is own for own in chosen.values()))
    try:
        yield
    finally:
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
        _set(chosen, before)


@contextmanager
def _holding(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Have other values in parameters, as long as this is open."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _set(parameters, values)
    try:
        yield
    finally:
        _set(parameters, before)


@torch.no_grad()
def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
