"""Two models layer by layer: each layer of the second starts from what the first one computed.

Whole models are compared badly: the last bits in which two kernels differ grow from layer to layer,
and by how much is up to the model and the processor.  Here a layer is held against the bound of its
own sum, and everything between the layers must come out to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from claq_exp.models.discover import linear_weight

UNIT = 2.0**-24  # relative error of a float32 operation


@dataclass(frozen=True)
class Steps:
    """What a model computed.

    layers: name -> (input, output, how far a float32 sum may be from it) of every call.
    """

    logits: Tensor
    layers: dict[str, list[tuple[Tensor, Tensor, Tensor]]]


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(tokens).logits


def recorded(model: nn.Module, names: Iterable[str], tokens: Tensor) -> Steps:
    """Run a model whose linears `names` are dense, and note what they compute."""
    layers: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}

    def note(name: str):
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            layers[name].append((args[0], output, _bound(linear_weight(module), args[0], output)))

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    logits = logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    return Steps(logits, layers)


def assert_follows(model: nn.Module, steps: Steps, tokens: Tensor) -> None:
    """Run another form of the model, lead it along the steps, and check each of them."""
    left = {name: list(calls) for name, calls in steps.layers.items()}

    def lead(name: str):
        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            inputs, expected, bound = left[name].pop(0)
            assert torch.equal(args[0], inputs), name
            assert output.dtype == expected.dtype
            misses = (output.double() - expected.double()).abs()
            assert bool((misses <= bound).all()), f"{name}: {float((misses / bound).max())}"
            return expected

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(lead(name)) for name in left]
    logits = logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    assert not any(left.values())
    assert torch.equal(logits, steps.logits)


def _bound(weight: Tensor, inputs: Tensor, output: Tensor) -> Tensor:
    """How far two sums of the same products in any order may be apart, each rounded to the output.

    See `rounding_bound` of the packed matrices; a weight may be rounded to the type of the output.
    """
    sizes = inputs.double().abs() @ weight.double().abs().t()
    rounding = 0.0 if output.dtype == torch.float32 else 2 * torch.finfo(output.dtype).eps
    return 2 * ((weight.shape[1] + 8) * UNIT + rounding) * sizes + 1e-12
