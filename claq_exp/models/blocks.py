"""Running a model block by block on recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to end a forward pass whose rest is not needed."""


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class BlockInputs:
    """What enters one decoder block.

    hidden: one [batch, seqlen, width] tensor per batch.
    arguments: number of windows in a batch -> the block's further positional and keyword arguments.
    """

    hidden: list[Tensor] = field(default_factory=list)
    arguments: dict[int, Arguments] = field(default_factory=dict)


@torch.inference_mode()
def capture_inputs(
    model: nn.Module, blocks: nn.ModuleList, batches: list[Tensor]
) -> list[BlockInputs]:
    """Record what enters each block.

    batches: token ids [batch, seqlen] of one length.  The first batch of each size runs up to the
    last block, for every block's own arguments (masks and position tables differ between blocks in
    some models); of the others only the first block's hidden states are taken.  Returns one
    BlockInputs per block, of which only the first has hidden states.
    """
    inputs = [BlockInputs() for _ in blocks]
    for batch in batches:
        size = len(batch)
        last = 0 if size in inputs[0].arguments else len(blocks) - 1
        hooks = [
            block.register_forward_pre_hook(
                _recorder(inputs[index], size, index == 0, index == last), with_kwargs=True
            )
            for index, block in enumerate(blocks[: last + 1])
        ]
        try:
            model(batch, use_cache=False)
        except StopForward:
            pass
        finally:
            for hook in hooks:
                hook.remove()
    return inputs


def _recorder(inputs: BlockInputs, size: int, first: bool, last: bool) -> Callable[..., None]:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keyword = dict(kwargs)
        hidden = args[0] if args else keyword.pop("hidden_states")
        if first:
            inputs.hidden.append(hidden)
        inputs.arguments.setdefault(size, (args[1:], keyword))
        if last:
            raise StopForward

    return record


@torch.inference_mode()
def run_block(block: nn.Module, inputs: BlockInputs, batch: int) -> Tensor:
    """Run one batch through a block and return its hidden states [batch, seqlen, width]."""
    hidden = inputs.hidden[batch]
    positional, keyword = inputs.arguments[len(hidden)]
    output = block(hidden, *positional, **keyword)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def watched(sinks: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Hand what enters each module to its sink, as long as this is open."""
    hooks = [
        module.register_forward_pre_hook(lambda _, args, sink=sink: sink(args[0]))
        for module, sink in sinks.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def feed(
    block: nn.Module,
    inputs: BlockInputs,
    batch: int,
    sinks: Mapping[nn.Module, Callable[[Tensor], None]],
) -> None:
    """Run one batch and hand what enters each module to its sink; a single module ends the run."""

    def stop(_: Tensor) -> None:
        raise StopForward

    last = dict.fromkeys(sinks if len(sinks) == 1 else (), stop)
    with suppress(StopForward), watched(sinks), watched(last):
        run_block(block, inputs, batch)
