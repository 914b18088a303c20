"""The gradients of the loss in the outputs of linears, block by block from the last to the first.

The calibration windows go forth through the original model, and what enters each block is kept;
then the gradient of their loss goes back.  One block and the graph of one batch are in memory at a
time.  Of a gradient nothing is kept but the mean square over the rows of each group, at each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from claq_exp.errors import CalibrationError
from claq_exp.models.blocks import (
    BlockInputs,
    block_arguments,
    entering_hidden,
    finish,
    run_block,
    watched,
)
from claq_exp.models.discover import linears_of
from claq_exp.models.stream import BlockedModel

LOSS_SCALE = 1024.0  # half precision loses gradients of the logits that are smaller than 6e-8
OnShare = Callable[[float, str], None]


@dataclass
class BackwardPass:
    """Measures gradients in the outputs of all linears of a model's blocks.

    batches: token ids [batch, seqlen], of one length, any of which may be asked for.
    groups: of neighbouring rows, in equal numbers.
    """

    model: BlockedModel
    batches: list[Tensor]
    groups: int = 1

    def __post_init__(self) -> None:
        self._inputs = block_arguments(self.model, self.batches)

    def squares(
        self, numbers: Sequence[int], on_share: OnShare = lambda _share, _where: None
    ) -> list[dict[str, Tensor]]:
        """Return the mean squares of the gradients over some batches, which go at once.

        numbers: of batches.  on_share: called with (share of the work just done, where).
        Returns of each: full name of a linear -> [batch, seqlen, groups] float32, the mean over the
        rows of a group of (dL/dy)^2.  L is the sum of the negative log-likelihoods of all next
        tokens.
        Raises CalibrationError for a gradient that is not finite.
        """
        if not numbers:
            return []
        own = [self.batches[number] for number in numbers]
        steps = 3 * len(self.model.blocks) + 1  # a block is one forth and two back
        tell = partial(_tell, on_share, steps)
        entering = self._forth(own, tell)
        gradients = self._of_the_loss(own, entering.pop())
        tell(1, "head")
        found: list[dict[str, Tensor]] = [{} for _ in own]
        for index in reversed(range(len(self.model.blocks))):
            hidden = entering.pop()
            path = f"{self.model.path}.{index}"
            with self.model.block(index, original=True) as block:
                for place, gradient in enumerate(gradients):
                    inputs = replace(self._inputs[index], hidden=[hidden[place]])
                    gradients[place], squares = backward(block, inputs, gradient, self.groups)
                    found[place] |= {f"{path}.{name}": part for name, part in squares.items()}
            tell(2, f"block {index}, backward")
        for number, squares in zip(numbers, found, strict=True):
            _check_finite(squares, number)
        return found

    @torch.no_grad()
    def _forth(self, batches: list[Tensor], tell: Callable[[int, str], None]) -> list[list[Tensor]]:
        """Return what enters each block, and what leaves the last one, of each batch."""
        entering = [list(entering_hidden(self.model, batches))]
        for index, inputs in enumerate(self._inputs):
            with self.model.block(index, original=True) as block:
                given = replace(inputs, hidden=entering[-1])
                entering.append([run_block(block, given, place) for place in range(len(batches))])
            tell(1, f"block {index}, forward")
        return entering

    def _of_the_loss(self, batches: list[Tensor], leaving: list[Tensor]) -> list[Tensor]:
        """Return the gradient of the loss in what leaves the last block: float32, each batch."""
        windows = [window[None] for batch in batches for window in batch]
        leaves = [
            hidden[None].to(self.model.device).requires_grad_()
            for states in leaving
            for hidden in states
        ]
        found: list[Tensor] = []
        with torch.enable_grad():
            outputs = finish(self.model, windows, leaves)
            for tokens, leaf, output in zip(windows, leaves, outputs, strict=True):
                logits = output.logits[0, :-1].float()
                loss = nn.functional.cross_entropy(
                    logits, tokens[0, 1:].to(logits.device), reduction="sum"
                )
                (gradient,) = torch.autograd.grad(loss * LOSS_SCALE, leaf)
                found.append(gradient.float() / LOSS_SCALE)
                del logits, loss, output
        return list(torch.cat(found).split([len(batch) for batch in batches]))


def backward(
    block: nn.Module, inputs: BlockInputs, gradient: Tensor, groups: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Send a gradient back through a block, whose only batch is run again.

    gradient: [batch, seqlen, width] float32, of what leaves the block.  On its way through the
    block it is scaled by a power of two, so that its largest number is between 1 and 2.
    Returns the gradient of what enters, float32; and name of a linear -> [batch, seqlen, groups]
    float32, the mean squares of the gradient in its outputs, zeros where it has none.
    """
    hidden = inputs.hidden[0].to(inputs.device, inputs.dtype).detach().requires_grad_()
    tokens = tuple(hidden.shape[:2])
    found: dict[str, Tensor] = {}
    scale = _power_of_two(gradient)

    def keep(name: str, arrived: Tensor) -> None:
        rows = arrived.float().reshape(*tokens, groups, -1) / scale
        found[name] = rows.square().mean(dim=-1).cpu()

    def watch(name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(keep, name))

    linears = linears_of(block)
    sinks = {module: partial(watch, name) for name, module in linears.items()}
    with torch.enable_grad(), watched({}, sinks):
        output = run_block(block, replace(inputs, hidden=[hidden]), 0)
        arriving = (gradient * scale).to(output.device, output.dtype)
        (entering,) = torch.autograd.grad(output, hidden, arriving)
    nothing = torch.zeros(*tokens, groups)
    return entering.float() / scale, {name: found.get(name, nothing) for name in linears}


def _tell(on_share: OnShare, steps: int, done: int, where: str) -> None:
    on_share(done / steps, where)


def _power_of_two(gradient: Tensor) -> float:
    """Return what brings the largest number of a gradient to [1, 2); 1 where there is none."""
    largest = float(gradient.abs().max())
    if not 0 < largest < math.inf:
        return 1.0
    return float(2.0 ** -math.floor(math.log2(largest)))


def _check_finite(squares: dict[str, Tensor], batch: int) -> None:
    for name, part in squares.items():
        if not torch.isfinite(part).all():
            raise CalibrationError(
                f"the gradients of {name} are not finite (calibration batch {batch}); set "
                "model.dtype=float32 or bfloat16, or objective=plain"
            )
