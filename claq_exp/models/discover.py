"""Decoder blocks and groups of linear layers that share an input, found by looking."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from claq_exp.errors import ConfigError, SourceError
from claq_exp.models.blocks import BlockInputs, run_block

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that receive the same tensor, by their names inside the block."""

    names: tuple[str, ...]


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Return (name, modules) of the decoder blocks.

    path: name of the list, for models where the rule (the list whose blocks hold most weights in
    linear layers) finds the wrong one.  Raises ConfigError that says what was looked for.
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
    if not lists:
        raise ConfigError(
            f"no decoder blocks found in {type(model).__name__}: looked for an nn.ModuleList "
            "with linear layers; name it with model.blocks"
        )
    name = max(lists, key=lambda key: _linear_weights(lists[key]))
    return name, lists[name]


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """Return name -> linear layer of one block.

    Raises ConfigError when the block holds matrices outside of linear layers, e.g. fused experts:
    they would stay in 16 bits without a word.
    """
    linears: dict[str, nn.Module] = {
        name: module for name, module in block.named_modules() if isinstance(module, LINEAR)
    }
    held = {f"{name}.weight" for name in linears}
    matrices = [name for name, value in block.named_parameters() if value.ndim > 1]
    if outside := [name for name in matrices if name not in held]:
        raise ConfigError(
            f"{type(block).__name__} holds weights outside of linear layers ({outside[0]}); "
            "such models, e.g. mixtures with fused experts, cannot be quantized yet"
        )
    return linears


def linear_weight(module: nn.Module) -> Tensor:
    """Return a linear layer's weight as an [out, in] view: writing to it changes the layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


def find_groups(block: nn.Module, inputs: BlockInputs) -> list[LinearGroup]:
    """Run a block on its first batch and group its linears by the tensor that they receive.

    Groups come in execution order (Llama: q,k,v - o - gate,up - down).  Raises SourceError for a
    layer that received nothing.
    """
    linears = linears_of(block)
    seen: list[tuple[str, Tensor]] = []  # holds the tensors, so that no address is given twice
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
        for name, module in linears.items()
    ]
    try:
        run_block(block, inputs, 0)
    finally:
        for hook in hooks:
            hook.remove()
    if unfed := set(linears) - {name for name, _ in seen}:
        raise SourceError(
            f"linear layers {', '.join(sorted(unfed))} received no input from the first "
            "calibration batch"
        )
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in seen:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if name not in groups.setdefault(key, []):
            groups[key].append(name)
    return [LinearGroup(tuple(names)) for names in groups.values()]


def _linear_weights(module: nn.Module) -> int:
    return sum(
        linear_weight(child).numel() for child in module.modules() if isinstance(child, LINEAR)
    )
