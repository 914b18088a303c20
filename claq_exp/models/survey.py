"""What an allocation over a whole model must know before the first layer is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from claq_exp.calibration.hessian import HessianAccumulator
from claq_exp.errors import CalibrationError, NumericalError
from claq_exp.models.blocks import capture_inputs, run_block
from claq_exp.models.discover import find_blocks, find_groups, linear_weight, linears_of
from claq_exp.quantize.solver import Solver
from claq_exp.quantize.statistics import ColumnStatistics

LEAST_IMPORTANCE = 0.01  # of the mean: a few windows do not show that a row does not matter
BACKWARD = 0.6  # of the survey's time, where gradients are asked for


@dataclass
class _Gradients:
    """Sums the squared gradient of the loss with respect to each output of a linear layer."""

    squares: Tensor
    tokens: int = 0

    def add(self, gradient: Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        self.squares += flat.square().sum(dim=0).cpu()
        self.tokens += len(flat)


def survey_model(
    model: nn.Module,
    batches: list[Tensor],
    solver: Solver,
    *,
    gradients: bool,
    blocks_path: str | None = None,
    on_share: Callable[[float, str], None] = lambda _share, _where: None,
) -> dict[str, ColumnStatistics]:
    """Return the statistics of every linear layer of the original model's decoder blocks.

    batches: token ids [batch, seqlen] on the model's device.
    gradients: measure the importance of rows, E[(dL/dy_i)^2] over tokens (the diagonal of the
        output factor of a Kronecker-factored Fisher matrix, Martens and Grosse, 2015); without,
        the distortion weights of each matrix are divided by tr(W H W^T), so that all matrices count
        alike.
    Raises CalibrationError when a gradient is not finite.
    """
    path, blocks = find_blocks(model, blocks_path)
    importance: dict[str, Tensor] = {}
    if gradients:
        importance = _row_importance(
            model, batches, path, blocks, lambda share, where: on_share(BACKWARD * share, where)
        )
    share = (1 - BACKWARD * gradients) / len(blocks)
    inputs = capture_inputs(model, blocks, batches)
    statistics: dict[str, ColumnStatistics] = {}
    for index, block in enumerate(blocks):
        hidden, hessians = block_hessians(block, inputs[index], f"{path}.{index}")
        inputs[index].hidden = []
        if index + 1 < len(blocks):
            inputs[index + 1].hidden = hidden
        for names, hessian in hessians:
            try:
                system = solver.prepare(hessian)
            except NumericalError as error:
                raise NumericalError(f"{path}.{index}.{names[0]}: {error}") from error
            for name in names:
                weight = linear_weight(block.get_submodule(name)).detach().to("cpu", torch.float32)
                full_name = f"{path}.{index}.{name}"
                distortion = system.distortion_weight
                if not gradients:
                    whole = (weight @ hessian.float()).mul_(weight).sum()
                    distortion = distortion / whole.clamp(min=torch.finfo(torch.float32).tiny)
                statistics[full_name] = ColumnStatistics(
                    weight, distortion, system.order, full_name, importance.get(full_name)
                )
        on_share(share, f"{path}.{index}")
    return statistics


@torch.inference_mode()
def block_hessians(
    block: nn.Module, inputs: Any, where: str
) -> tuple[list[Tensor], list[tuple[tuple[str, ...], Tensor]]]:
    """Run a block; return its outputs and the Hessian of each group of linears."""
    groups = find_groups(block, inputs)
    found, hooks = [], []
    for group in groups:
        first = block.get_submodule(group.names[0])
        accumulator = HessianAccumulator(linear_weight(first).shape[1])
        found.append((group.names, accumulator))
        hooks.append(
            first.register_forward_pre_hook(_accumulate(accumulator, f"{where}.{group.names[0]}"))
        )
    try:
        hidden = [run_block(block, inputs, batch) for batch in range(len(inputs.hidden))]
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, [(names, accumulator.hessian()) for names, accumulator in found]


def _accumulate(accumulator: HessianAccumulator, where: str) -> Callable[..., None]:
    def add(_: nn.Module, args: tuple[Any, ...]) -> None:
        accumulator.add(args[0], where)

    return add


def _row_importance(
    model: nn.Module,
    batches: list[Tensor],
    path: str,
    blocks: nn.ModuleList,
    on_share: Callable[[float, str], None],
) -> dict[str, Tensor]:
    """Return E[(dL/dy_i)^2] of each linear's outputs: name -> [out] float32.

    L is the sum of a window's negative log-likelihoods, one window at a time; no gradient of a
    parameter is kept.
    """
    sums: dict[str, _Gradients] = {}
    hooks = []
    for index, block in enumerate(blocks):
        for name, module in linears_of(block).items():
            held = _Gradients(torch.zeros(linear_weight(module).shape[0]))
            sums[f"{path}.{index}.{name}"] = held
            hooks.append(module.register_forward_hook(_watch(held)))
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    hooks.append(embeddings.register_forward_hook(_require_gradient))
    windows = [window for batch in batches for window in batch]
    try:
        with _frozen(model), torch.enable_grad():
            for number, window in enumerate(windows):
                tokens = window[None]
                logits = model(tokens, use_cache=False).logits
                loss = nn.functional.cross_entropy(
                    logits[0, :-1].float(), tokens[0, 1:], reduction="sum"
                )
                loss.backward()
                on_share(1 / len(windows), f"gradients, window {number + 1}")
    finally:
        for hook in hooks:
            hook.remove()
    importance = {}
    for name, held in sums.items():
        mean = held.squares / max(held.tokens, 1)
        if not torch.isfinite(mean).all():
            raise CalibrationError(
                f"the gradients of {name} are not finite; set precision.importance=output, or "
                "check model.dtype"
            )
        if mean.sum() > 0:
            importance[name] = mean.clamp(min=LEAST_IMPORTANCE * mean.mean().item())
    return importance


def _watch(held: _Gradients) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(held.add)

    return hook


def _require_gradient(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.requires_grad_()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Take the parameters out of the backward pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
