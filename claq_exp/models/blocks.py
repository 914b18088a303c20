"""Running a model block by block on recorded inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to end a forward pass whose rest is not needed."""


@dataclass
class BlockInputs:
    """What enters one decoder block.

    hidden: one [batch, seqlen, width] tensor per batch.
    positional, keyword: the block's further arguments, equal for all batches of one length.
    """

    hidden: list[Tensor]
    positional: tuple[Any, ...]
    keyword: dict[str, Any]


@torch.inference_mode()
def capture_inputs(
    model: nn.Module, blocks: nn.ModuleList, batches: list[Tensor]
) -> list[BlockInputs]:
    """Record what enters each block.

    batches: token ids [batch, seqlen], all of one shape.  The first batch runs up to the last
    block, for every block's own arguments (masks and position tables differ between blocks in some
    models); of the others only the first block's hidden states are taken.  Returns one BlockInputs
    per block, of which only the first has hidden states.
    """
    inputs: list[BlockInputs] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, rest = _split(args, kwargs)
        inputs.append(BlockInputs([hidden] if not inputs else [], args[1:], rest))
        if len(inputs) == len(blocks):
            raise StopForward

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[0].hidden.append(_split(args, kwargs)[0])
        raise StopForward

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        model(batches[0], use_cache=False)
    except StopForward:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    hook = blocks[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        for batch in batches[1:]:
            try:
                model(batch, use_cache=False)
            except StopForward:
                continue
    finally:
        hook.remove()
    return inputs


@torch.inference_mode()
def run_block(block: nn.Module, inputs: BlockInputs, batch: int) -> Tensor:
    """Run one batch through a block and return its hidden states [batch, seqlen, width]."""
    output = block(inputs.hidden[batch], *inputs.positional, **inputs.keyword)
    return output[0] if isinstance(output, tuple) else output


def run_until(block: nn.Module, inputs: BlockInputs, batch: int, module: nn.Module) -> Tensor:
    """Run one batch up to a module inside the block and return the tensor that enters it."""
    entered: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append(args[0])
        raise StopForward

    hook = module.register_forward_pre_hook(stop)
    try:
        run_block(block, inputs, batch)
    except StopForward:
        pass
    finally:
        hook.remove()
    return entered[0]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    rest = dict(kwargs)
    hidden = args[0] if args else rest.pop("hidden_states")
    return hidden, rest
