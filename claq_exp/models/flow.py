"""What must be true of decoder blocks so that they can be run one by one, and the check of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from claq_exp.errors import ConfigError, telling_line
from claq_exp.models.blocks import StopForward, first_output, replaced

if TYPE_CHECKING:
    from claq_exp.models.stream import BlockedModel

AHEAD = 0.05  # relative change of hidden states that is no rounding, be it of bfloat16
TOKENS = torch.tensor([[1, 2] + [later] * 6 for later in (1, 2)])


@dataclass
class _Call:
    """One call of a block.  given: what the block before has returned, None for the first."""

    block: int
    hidden: Any
    arguments: dict[str, Any]
    given: Tensor | None


@torch.no_grad()
def check_flow(model: BlockedModel, name: str) -> None:
    """Raise ConfigError for a model that cannot be quantized block by block; name: of the model.

    A model can be when its blocks run once each, in their order; when each takes the hidden states
    [batch, tokens, width] that the one before returned; when nothing else that a block takes
    depends on the tokens or on another block; and when no token sees a later one.
    """
    about = f"{name} ({model.model.config.model_type})"
    try:
        output = first_output(model, TOKENS)
        calls, others = _calls(model, TOKENS, output), _calls(model, TOKENS.flip(0), output)
    except Exception as error:
        raise ConfigError(
            f"{about} cannot be run on token ids alone: {telling_line(error)}"
        ) from error
    if found := next(_obstacles(model.blocks, output, calls, others), None):
        raise ConfigError(
            f"{about} cannot be quantized block by block: {found}; this release takes models whose "
            "blocks hand on hidden states and nothing else"
        )
    hidden = output[0] if isinstance(output, tuple) else output
    if _looks_ahead(hidden):
        raise ConfigError(
            f"{about} is no causal language model: what it predicts after a token changes with the "
            "tokens that follow; give a decoder"
        )


def _looks_ahead(hidden: Tensor) -> bool:
    """Tell whether a later token changes what is known of an earlier one, as in BERT."""
    first, second = hidden[:, 1].float()
    return bool((first - second).norm() > AHEAD * first.norm())


def _obstacles(
    blocks: nn.ModuleList, output: Any, calls: list[_Call], others: list[_Call]
) -> Iterator[str]:
    """Yield what stands in the way, most telling first.  others: calls with other tokens."""
    batch, tokens = TOKENS.shape
    entering = calls[0].hidden if calls else None
    if isinstance(entering, Tensor) and entering.ndim != 3:
        shape = " x ".join(map(str, entering.shape))
        yield f"for {batch} x {tokens} tokens its blocks take hidden states of {shape}"
    leaving = output[0] if isinstance(output, tuple) else output
    if not isinstance(entering, Tensor) or not isinstance(leaving, Tensor):
        yield f"its blocks return {type(leaving).__name__}, not hidden states"
        return
    if leaving.shape != entering.shape:
        yield f"its blocks take {tuple(entering.shape)} and return {tuple(leaving.shape)}"
    order = [call.block for call in calls]
    if order != list(range(len(blocks))):
        runs = ", ".join(map(str, order))
        yield f"of its {len(blocks)} blocks these run on text, in this order: {runs}"
        return
    for call, other in zip(calls, others, strict=True):
        for name, value in call.arguments.items():
            if _holds_state(value):
                yield f"its blocks share what they compute by '{name}' ({type(value).__name__})"
            if not _same(value, other.arguments.get(name)):
                yield f"block {call.block} also takes '{name}', which changes with the tokens"
    for call in calls:
        if call.given is not None and not _same(call.hidden, call.given):
            yield f"block {call.block} does not take what block {call.block - 1} returns"


def _calls(model: BlockedModel, tokens: Tensor, output: Any) -> list[_Call]:
    """Note how the model calls its blocks; each returns random numbers in the form of `output`."""
    calls: list[_Call] = []
    returned: list[Tensor | None] = [None]
    dice = torch.Generator().manual_seed(0)

    def noted(index: int) -> Callable[..., Any]:
        names = [*inspect.signature(type(model.blocks[index]).forward).parameters][1:]

        def run(*args: Any, **keyword: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **keyword}
            hidden = arguments.pop(names[0] if args else "hidden_states")
            calls.append(_Call(index, hidden, arguments, returned[0]))
            returned[0] = torch.rand(hidden.shape, generator=dice).to(hidden)
            return (returned[0], *output[1:]) if isinstance(output, tuple) else returned[0]

        return run

    def stop(*_: Any) -> None:
        raise StopForward

    with model.outside(head=False) as whole:
        head = whole.get_output_embeddings()
        hook = head.register_forward_pre_hook(stop) if head is not None else None
        try:
            with replaced(model.blocks, [noted(index) for index in range(len(model.blocks))]):
                whole(tokens.to(model.device), use_cache=False)
        except StopForward:
            pass
        except Exception:
            if len(calls) < len(model.blocks):  # else it is in what follows, whose weights are away
                raise
        finally:
            if hook is not None:
                hook.remove()
    return calls


def _same(value: Any, other: Any) -> bool:
    """Compare two arguments of a block; objects of unknown kind count as the same."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and torch.equal(value, other)
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(value) == len(other) and all(map(_same, value, other))
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(_same(value[k], other[k]) for k in value)
    return not isinstance(value, Tensor) and not isinstance(other, Tensor)


def _holds_state(value: Any) -> bool:
    """Tell whether an argument is there for blocks to write to: a cache, or an empty collection."""
    return isinstance(value, Cache) or (isinstance(value, (dict, list)) and not value)
