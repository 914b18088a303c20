"""Decoder blocks and groups of linear layers that share an input, found by looking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from claq_exp.errors import ConfigError, SourceError
from claq_exp.models.blocks import BlockInputs, run_block, watched
from claq_exp.models.experts import expert_lists, place_among_experts, router_weights
from claq_exp.models.towers import text_tower

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that receive the same tensor, by their names inside the block."""

    names: tuple[str, ...]


# Groups whose inputs do not depend on each other: one, or the same layers of all experts.
Wave = tuple[LinearGroup, ...]


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Return (name, modules) of the decoder blocks.

    path: name of the list, for models where the rule (the list of the text tower whose blocks hold
    most weights in linear layers) finds the wrong one.  Raises ConfigError that says what was
    looked for.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _linear_weights(module)
    }
    if path is not None:
        if path not in lists:
            raise ConfigError(
                f"model.blocks '{path}' is no list of blocks with linear layers; found: "
                f"{', '.join(lists) or 'none'}"
            )
        return path, lists[path]
    tower, within = text_tower(model)
    own = {name: held for name, held in lists.items() if not tower or name.startswith(f"{tower}.")}
    if not own:
        beside = f"; outside of the text tower {tower} there are {', '.join(lists)}"
        raise ConfigError(
            f"no decoder blocks found in {type(within).__name__}: looked for an nn.ModuleList "
            f"with linear layers; name it with model.blocks{beside if lists else ''}"
        )
    name = max(own, key=lambda key: _linear_weights(own[key]))
    return name, own[name]


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """Return name -> linear layer of one block, without routers (`router_weights`).

    Raises ConfigError when the block holds other matrices outside of linear layers: they would stay
    in 16 bits without a word.
    """
    routers = router_weights(block)
    linears: dict[str, nn.Module] = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, LINEAR) and f"{name}.weight" not in routers
    }
    held = {f"{name}.weight" for name in linears} | routers
    outside = {n: w for n, w in block.named_parameters() if w.ndim > 1 and n not in held}
    if outside:
        name = max(outside, key=lambda n: outside[n].numel())
        shape = " x ".join(map(str, outside[name].shape))
        raise ConfigError(
            f"{type(block).__name__} cannot be quantized: it holds {name} ({shape}) outside of "
            "what was looked for: linear layers, routers, and experts with gate_up_proj and "
            "down_proj as Mixtral's"
        )
    return linears


def norms_of(block: nn.Module) -> dict[str, nn.Module]:
    """Return name -> norm of a block: modules that hold vectors and nothing else.

    Linear layers and routers hold matrices, so that they and their biases are not among them.
    """
    return {
        name: module
        for name, module in block.named_modules()
        if name
        and not any(module.children())
        and (own := list(module.parameters(recurse=False)))
        and all(parameter.ndim == 1 for parameter in own)
    }


def linear_weight(module: nn.Module) -> Tensor:
    """Return a linear layer's weight as an [out, in] view: writing to it changes the layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


@torch.no_grad()
def find_waves(block: nn.Module, inputs: BlockInputs) -> list[Wave]:
    """Run a block on its first batch and group its linears by the tensor that they receive.

    Stages come in execution order (Llama: q,k,v - o - gate,up - down), each of one group.  Experts
    run side by side, so that their gate,up make one wave and their down another; an expert that no
    token of the batch was sent to has the groups of the others.  Raises SourceError for a layer
    that received nothing.
    """
    linears = linears_of(block)
    seen: list[tuple[str, Tensor]] = []  # holds the tensors, so that no address is given twice

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: seen.append((name, tensor))

    with watched({module: note(name) for name, module in linears.items()}):
        run_block(block, inputs, 0)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in seen:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and name not in groups.setdefault(key, []):
            groups[key].append(name)
    waves = _waves([tuple(names) for names in groups.values()], expert_lists(block))
    fed = {name for wave in waves for group in wave for name in group.names}
    if unfed := sorted(set(linears) - fed):
        raise SourceError(
            f"linear layers {', '.join(unfed)} received no input from the first calibration batch"
        )
    return waves


def apart(waves: list[Wave]) -> list[Wave]:
    """Return the same waves with every linear in a group of its own.

    For moments in which a token does not weigh the same for all linears that receive it.
    """
    return [tuple(LinearGroup((name,)) for group in wave for name in group.names) for wave in waves]


def _waves(groups: list[tuple[str, ...]], lists: Mapping[str, nn.ModuleList]) -> list[Wave]:
    """Gather the groups of experts that do the same; give it to those that did nothing too."""
    waves: dict[object, dict[int, LinearGroup]] = {}
    for names in groups:
        places = [place_among_experts(name, lists) for name in names]
        first = places[0]
        if first is None or None in places:
            waves[names] = {0: LinearGroup(names)}
            continue
        layers = [place.layer for place in places if place is not None]
        everyone = range(len(lists[first.experts]))
        waves.setdefault(
            (first.experts, *layers),
            {
                index: LinearGroup(tuple(f"{first.experts}.{index}.{layer}" for layer in layers))
                for index in everyone
            },
        )
    return [tuple(wave.values()) for wave in waves.values()]


def _linear_weights(module: nn.Module) -> int:
    return sum(
        linear_weight(child).numel() for child in module.modules() if isinstance(child, LINEAR)
    )
