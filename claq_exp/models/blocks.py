"""Running a model block by block on recorded inputs.

Nothing here chooses between `no_grad`, `inference_mode` and gradients: callers do.  Only what is
recorded is always of ordinary tensors without a history, so that a block can be trained on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from claq_exp.models.wide import wide_passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from claq_exp.models.stream import BlockedModel, RowsOf

T = TypeVar("T")


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to end a forward pass whose rest is not needed."""


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _recording(function: Callable[..., T]) -> Callable[..., T]:
    """Have a function make ordinary tensors without a history, whatever the mode of its caller."""
    without_history: Callable[..., T] = torch.no_grad()(function)
    ordinary: Callable[..., T] = torch.inference_mode(False)(without_history)
    return ordinary


@dataclass
class BlockInputs:
    """What enters one decoder block.

    hidden: one [batch, seqlen, width] tensor per batch.
    arguments: number of windows in a batch -> the block's further positional and keyword arguments.
    dtype, device: what hidden states are brought to before they enter; None: as they are.
    """

    hidden: Sequence[Tensor] = field(default_factory=list)
    arguments: dict[int, Arguments] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    device: torch.device | None = None


def capture_inputs(model: BlockedModel, batches: list[Tensor]) -> list[BlockInputs]:
    """Record what enters each block: `block_arguments`, and the first block's hidden states."""
    inputs = block_arguments(model, batches)
    inputs[0].hidden = list(entering_hidden(model, batches))
    return inputs


@_recording
def block_arguments(model: BlockedModel, batches: list[Tensor]) -> list[BlockInputs]:
    """Record what each block gets besides hidden states, for every size of batch.

    batches: token ids [batch, seqlen] of one length.  The blocks do not run; they are asked one by
    one, for masks and position tables differ between blocks in some models.  Returns one
    BlockInputs per block, without hidden states.
    """
    inputs = [BlockInputs() for _ in model.blocks]
    wrap = _wrapper(model, batches[0])
    sizes = {len(batch): batch for batch in reversed(batches)}
    with model.outside(head=False) as whole:
        for size, batch in sizes.items():
            recorders = [
                _recorder(noted, size, index == len(inputs) - 1, wrap)
                for index, noted in enumerate(inputs)
            ]
            with _ended(whole), replaced(model.blocks, recorders):
                whole(batch.to(model.device), use_cache=False)
    return inputs


def _recorder(
    inputs: BlockInputs, size: int, last: bool, wrap: Callable[[Tensor], Any]
) -> Callable[..., Any]:
    """Return what takes the place of a block: it notes its arguments, and hands on what entered."""

    def record(*args: Any, **keyword: Any) -> Any:
        hidden = args[0] if args else keyword.pop("hidden_states")
        inputs.arguments[size] = (_ordinary(args[1:]), _ordinary(keyword))
        inputs.dtype, inputs.device = hidden.dtype, hidden.device
        if last:
            raise StopForward
        return wrap(hidden)

    return record


def _ordinary(value: Any) -> Any:
    """Return an argument of a block with copies of the inference tensors that a model has kept."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (tuple, list):
        return type(value)(map(_ordinary, value))
    if type(value) is dict:
        return {name: _ordinary(own) for name, own in value.items()}
    return value


@_recording
def entering_hidden(
    model: BlockedModel, batches: list[Tensor], rows_of: RowsOf | None = None
) -> Iterator[Tensor]:
    """Yield the hidden states that enter the first block: [batch, seqlen, width] of each batch.

    rows_of: what the embedding looks up in place of its own rows.
    """
    found: list[Tensor] = []

    def note(*args: Any, **keyword: Any) -> None:
        found.append(args[0] if args else keyword["hidden_states"])
        raise StopForward

    with model.outside(head=False, rows_of=rows_of) as whole:
        for batch in batches:
            with _ended(whole), replaced(model.blocks, [note] * len(model.blocks)):
                whole(batch.to(model.device), use_cache=False)
            yield found.pop()


def first_output(model: BlockedModel, tokens: Tensor) -> Any:
    """Return what the first block gives for token ids [batch, seqlen]."""
    outputs: list[Any] = []
    with model.outside(head=False) as whole, model.block(0) as block:
        forward = block.forward

        def run(*args: Any, **keyword: Any) -> None:
            outputs.append(forward(*args, **keyword))
            raise StopForward

        others = [run] * len(model.blocks)
        with _ended(whole), replaced(model.blocks, others):
            whole(tokens.to(model.device), use_cache=False)
    return outputs[0]


def _wrapper(model: BlockedModel, tokens: Tensor) -> Callable[[Tensor], Any]:
    """Return what makes a block's whole output of its hidden states."""
    with torch.no_grad():  # nothing but the form of the output is of use
        output = first_output(model, tokens[:1, :2])
    return (lambda hidden: (hidden, *output[1:])) if isinstance(output, tuple) else lambda h: h


def finish(model: BlockedModel, batches: list[Tensor], hidden: Iterable[Tensor]) -> Iterator[Any]:
    """Yield the model's output for each batch of token ids, given what leaves the last block."""
    wrap = _wrapper(model, batches[0])
    with model.outside(head=True) as whole:
        for batch, states in zip(batches, hidden, strict=True):
            done = [lambda *_, states=states, **__: wrap(states)] * len(model.blocks)
            with wide_passes(whole.dtype), replaced(model.blocks, done):
                output = whole(batch.to(model.device), use_cache=False)
            yield output


@_recording
def entering_head(
    model: BlockedModel, batches: list[Tensor], hidden: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Yield what enters the head for each batch of token ids, given what leaves the last block.

    Weights behind the blocks are in memory, those of the head are not: [batch, seqlen, width].
    """
    wrap = _wrapper(model, batches[0])
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise StopForward

    with model.outside(head=False) as whole:
        hook = whole.get_output_embeddings().register_forward_pre_hook(note)
        try:
            for batch, states in zip(batches, hidden, strict=True):
                entering = states.to(model.device, whole.dtype)
                done = [lambda *_, states=entering, **__: wrap(states)] * len(model.blocks)
                with _ended(whole), replaced(model.blocks, done):
                    whole(batch.to(model.device), use_cache=False)
                yield found.pop()
        finally:
            hook.remove()


@contextmanager
def _ended(model: PreTrainedModel) -> Iterator[None]:
    """Have a pass through a model, which a hook may end."""
    with suppress(StopForward), wide_passes(model.dtype):
        yield


@contextmanager
def replaced(blocks: nn.ModuleList, forwards: list[Callable[..., Any]]) -> Iterator[None]:
    """Have other functions compute the blocks, as long as this is open."""
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def run_block(block: nn.Module, inputs: BlockInputs, batch: int) -> Tensor:
    """Run one batch through a block and return its hidden states [batch, seqlen, width]."""
    hidden = inputs.hidden[batch].to(device=inputs.device, dtype=inputs.dtype)
    positional, keyword = inputs.arguments[len(hidden)]
    with wide_passes(hidden.dtype):
        output = block(hidden, *positional, **keyword)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def watched(
    entering: Mapping[nn.Module, Callable[[Tensor], None]],
    leaving: Mapping[nn.Module, Callable[[Tensor], None]] | None = None,
) -> Iterator[None]:
    """Hand what enters and what leaves modules to their sinks, as long as this is open."""
    hooks = [
        module.register_forward_pre_hook(lambda _, args, sink=sink: sink(args[0]))
        for module, sink in entering.items()
    ]
    hooks += [
        module.register_forward_hook(lambda _, __, output, sink=sink: sink(output))
        for module, sink in (leaving or {}).items()
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
