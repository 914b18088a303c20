"""Logits of windows of text, from a model in memory or from one that is read block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from claq_exp.models.blocks import capture_inputs, entering_hidden, finish, run_block
from claq_exp.models.dispatch import input_device
from claq_exp.models.stream import BlockedModel

Tick = Callable[[float], None]
BLOCKS = 0.9  # of a streamed pass is spent in the blocks
HIDDEN_BYTES = 2**30  # of hidden states at a time: a pass over the model for each such part


class Predictor(Protocol):
    """Gives logits for batches of token ids [batch, seqlen], one [batch, seqlen, vocabulary] each.

    tick: called with windows done, also parts of one.
    """

    def __call__(self, batches: list[Tensor], tick: Tick) -> Iterator[Tensor]:
        """Yield the logits of each batch."""


class Subject:
    """A model to be measured, which is loaded when it is needed.

    name: original or quantized.  device: where it takes token ids; None where accelerate decides.
    load: brings it into memory.  open: for reading it block by block; None where it is to be
    measured in memory.
    """

    def __init__(
        self,
        name: str,
        device: str | None,
        load: Callable[[], PreTrainedModel],
        open_: Callable[[], BlockedModel] | None = None,
    ) -> None:
        self.name = name
        self._device = device
        self._open = open_
        self.model = cache(load)

    def predict(self, batches: list[Tensor], tick: Tick) -> Iterator[Tensor]:
        """Yield the logits of each batch, see `Predictor`."""
        if self._open is not None:
            return streamed(self._open())(batches, tick)
        model = self.model()
        return in_memory(model, self._device or input_device(model))(batches, tick)


def in_memory(model: nn.Module, device: str | torch.device) -> Predictor:
    """Return the predictor of a model that is loaded.  device: where it takes token ids."""

    @torch.inference_mode()
    def predict(batches: list[Tensor], tick: Tick) -> Iterator[Tensor]:
        for batch in batches:
            yield model(batch.to(device), use_cache=False).logits
            tick(len(batch))

    return predict


def streamed(model: BlockedModel, hidden_bytes: int = HIDDEN_BYTES) -> Predictor:
    """Return the predictor of a model whose blocks are read one after another.

    The results are those of the model in memory, to the bit.  hidden_bytes: of hidden states that
    are held; more text than that goes through the model in parts.
    """

    @torch.inference_mode()
    def predict(batches: list[Tensor], tick: Tick) -> Iterator[Tensor]:
        first = next(entering_hidden(model, [batches[0][:1, :2]]))
        taken = first.shape[-1] * first.itemsize * batches[0].numel()
        at_once = max(1, hidden_bytes // taken)
        for start in range(0, len(batches), at_once):
            yield from _pass(model, batches[start : start + at_once], tick)

    return predict


def _pass(model: BlockedModel, batches: list[Tensor], tick: Tick) -> Iterator[Tensor]:
    inputs = capture_inputs(model, batches)
    hidden = list(inputs[0].hidden)
    windows = sum(map(len, batches))
    for index, entering in enumerate(inputs):
        entering.hidden = hidden
        with model.block(index) as block:
            for number in range(len(batches)):
                hidden[number] = run_block(block, entering, number)
        tick(BLOCKS * windows / len(inputs))
    for batch, output in zip(batches, finish(model, batches, hidden), strict=True):
        yield output.logits
        tick((1 - BLOCKS) * len(batch))
