"""What an allocation over a whole model must know before the first layer is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from claq_exp.allocate.head import HeadSurvey, SurveyedHead, at_least
from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.calibration.token_weights import TokenWeights
from claq_exp.errors import CalibrationError, NumericalError
from claq_exp.models.blocks import BlockInputs, capture_inputs, entering_head, run_block, watched
from claq_exp.models.discover import Wave, apart, find_waves, linear_weight, linears_of
from claq_exp.models.experts import ExpertPlace, expert_lists, place_among_experts
from claq_exp.models.stream import WholeModel
from claq_exp.models.wide import wide_passes
from claq_exp.quantize.moments import CROSS, OUTPUT_GRADIENTS, Moments
from claq_exp.quantize.solver import Solver
from claq_exp.quantize.solver.base import Prepared
from claq_exp.quantize.statistics import ColumnStatistics
from claq_exp.quantize.symmetric import product

BACKWARD = 0.6  # of the survey's time, where gradients are asked for


@dataclass
class _Gradients:
    """Sums the squared gradient of the loss with respect to each output of a linear layer."""

    squares: Tensor
    tokens: int = 0

    def add(self, gradient: Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        self.squares += flat.square().sum(dim=0)
        self.tokens += len(flat)


def survey_model(
    model: PreTrainedModel,
    batches: list[Tensor],
    solver: Solver,
    *,
    gradients: bool,
    blocks_path: str | None = None,
    head: SurveyedHead | None = None,
    weights: TokenWeights | None = None,
    on_share: Callable[[float, str], None] = lambda _share, _where: None,
) -> dict[str, ColumnStatistics]:
    """Return the statistics of every linear layer of the original model's decoder blocks.

    batches: token ids [batch, seqlen] on the model's device.
    gradients: measure the importance of rows, E[(dL/dy_i)^2] over tokens (the diagonal of the
        output factor of a Kronecker-factored Fisher matrix, Martens and Grosse, 2015); without,
        the distortion weights of each matrix are divided by tr(W H W^T), so that all matrices count
        alike.
    head: measure it too, behind the blocks; needs gradients.
    weights: of tokens, where they do not count alike; of the same windows and maybe some behind.
    Experts count by the share of tokens that they see.  Raises CalibrationError when a gradient is
    not finite.
    """
    blocked = WholeModel(model, blocks_path)
    path, blocks = blocked.path, blocked.blocks
    importance: dict[str, Tensor] = {}
    logits = None if head is None else HeadSurvey(model, head)
    if gradients:
        importance = _row_importance(model, batches, path, blocks, logits, on_share)
    share = (1 - BACKWARD * gradients) / (len(blocks) + (head is not None))
    inputs, wide = capture_inputs(blocked, batches), model.dtype == torch.float64
    statistics: dict[str, ColumnStatistics] = {}
    for index, block in enumerate(blocks):
        hidden, hessians = block_hessians(block, inputs[index], f"{path}.{index}", weights)
        inputs[index].hidden = []
        if index + 1 < len(blocks):
            inputs[index + 1].hidden = hidden
        for measured in hessians:
            where = f"{path}.{index}.{measured.names[0]}"
            moments = _moments(measured.hessian, solver, wide=wide)
            prepared = _prepared(moments, solver, where)
            for name in measured.names:
                weight = linear_weight(block.get_submodule(name)).detach().to("cpu", torch.float32)
                full_name = f"{path}.{index}.{name}"
                distortion = prepared.distortion_weight * measured.share
                if not gradients:
                    hessian = Moments(measured.hessian).single().float()
                    each = product(weight, hessian, wide=wide).mul_(weight)
                    whole = each.sum(dtype=torch.float64 if wide else None)
                    distortion = distortion / whole.clamp(min=torch.finfo(torch.float32).tiny)
                statistics[full_name] = ColumnStatistics(
                    weight, distortion, prepared.order, full_name, importance.get(full_name)
                )
        on_share(share, f"{path}.{index}")
    if logits is not None:
        statistics[logits.head.name] = _head_statistics(blocked, batches, hidden, logits)
        on_share(share, logits.head.name)
    return statistics


def _head_statistics(
    blocked: WholeModel, batches: list[Tensor], hidden: list[Tensor], logits: HeadSurvey
) -> ColumnStatistics:
    """Sum up what enters the head.  hidden: what leaves the last block."""
    name, solver = logits.head.name, logits.head.solver
    sums = MomentsAccumulator(linear_weight(blocked.model.get_submodule(name)).shape[1])
    for entering in entering_head(blocked, batches, hidden):
        sums.add(entering, where="the head")
    return logits.statistics(_prepared(sums.moments(), solver, name))


def _prepared(moments: Moments, solver: Solver, where: str) -> Prepared:
    try:
        return solver.prepare(moments)
    except NumericalError as error:
        raise NumericalError(f"{where}: {error}") from error


def _moments(hessian: Tensor, solver: Solver, *, wide: bool) -> Moments:
    """Return the moments of the original model, which differs nowhere from itself."""
    cross = torch.zeros_like(hessian) if CROSS in solver.wants else None
    return Moments(hessian, cross, wide=wide)


def statistics_tensors(statistics: Mapping[str, ColumnStatistics]) -> dict[str, Tensor]:
    """Return what a survey has measured, without the weights: `statistics_of` puts them back."""
    tensors = {}
    for number, (name, found) in enumerate(statistics.items()):
        parts = {
            "distortion_weight": found.distortion_weight,
            "order": found.order,
            "row_weights": found.row_weights,
        }
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{number:06}/{name}/{part}"] = tensor.clone(
                    memory_format=torch.contiguous_format
                )
    return tensors


def statistics_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, ColumnStatistics]:
    """Return a survey of a model from its weights and what was measured, in the survey's order."""
    measured: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        _, name, part = key.split("/")
        measured.setdefault(name, {})[part] = tensors[key]
    return {
        name: ColumnStatistics(
            linear_weight(model.get_submodule(name)).detach().to("cpu", torch.float32),
            name=name,
            **parts,
        )
        for name, parts in measured.items()
    }


@dataclass(frozen=True)
class GroupHessian:
    """A group of linears, the Hessian of its input, and the share of all tokens that it saw.

    hessian: [in, in] float64, or [groups, in, in] for groups of rows.
    """

    names: tuple[str, ...]
    hessian: Tensor
    share: float


@torch.no_grad()
def block_hessians(
    block: nn.Module, inputs: BlockInputs, where: str, weights: TokenWeights | None = None
) -> tuple[list[Tensor], list[GroupHessian]]:
    """Run a block; return its outputs and the Hessian of each group of linears.

    where: name of the block in its model.
    weights: of tokens, where they do not count alike; each linear is a group of its own then.

    An expert that saw no token gets the mean of the others, as if it had seen one.
    """
    waves = find_waves(block, inputs)
    if weights is not None:
        waves = apart(waves)
    sums: list[list[MomentsAccumulator]] = []
    sinks = {}
    for wave in waves:
        sums.append([])
        for group in wave:
            first = block.get_submodule(group.names[0])
            columns, name = linear_weight(first).shape[1], f"{where}.{group.names[0]}"
            if weights is None:
                sums[-1].append(MomentsAccumulator(columns))
                sinks[first] = _accumulate(sums[-1][-1], name)
            else:
                groups = weights.objective.groups
                sums[-1].append(MomentsAccumulator(columns, {OUTPUT_GRADIENTS}, groups))
                sinks[first] = _weighed(sums[-1][-1], name, weights.of(name))
    with watched(sinks):
        hidden = [run_block(block, inputs, batch) for batch in range(len(inputs.hidden))]
    tokens = sum(states.shape[:-1].numel() for states in inputs.hidden)
    return hidden, [
        measured
        for wave, accumulators in zip(waves, sums, strict=True)
        for measured in _measured(wave, accumulators, tokens)
    ]


def _measured(
    wave: Wave, accumulators: list[MomentsAccumulator], tokens: int
) -> Iterator[GroupHessian]:
    seen = sum(accumulator.tokens for accumulator in accumulators)
    for group, accumulator in zip(wave, accumulators, strict=True):
        if accumulator.tokens:
            found = accumulator.moments()
            hessian = found.hessian if found.groups > 1 else found.single()
        else:
            hessian = _mean(accumulators, seen)
        yield GroupHessian(group.names, hessian, max(accumulator.tokens, 1) / tokens)


def _mean(accumulators: list[MomentsAccumulator], seen: int) -> Tensor:
    """Return the Hessian of all tokens that were seen."""
    parts = (a.moments().single() * (a.tokens / seen) for a in accumulators)
    return sum(parts, torch.zeros(()))


def _accumulate(accumulator: MomentsAccumulator, where: str) -> Callable[[Tensor], None]:
    return lambda entering: accumulator.add(entering, where=where)


def _weighed(
    accumulator: MomentsAccumulator, where: str, weights: list[Tensor]
) -> Callable[[Tensor], None]:
    """Return what adds one batch after another.  weights: of the batches, and maybe more."""
    coming = iter(weights)

    def add(entering: Tensor) -> None:
        own = next(coming).flatten(0, -2)[: entering.shape[:-1].numel()]
        weighing = own.to(entering.device)
        accumulator.add(entering.flatten(0, -2), where=where, weights=weighing)

    return add


def _row_importance(
    model: PreTrainedModel,
    batches: list[Tensor],
    path: str,
    blocks: nn.ModuleList,
    head: HeadSurvey | None,
    on_share: Callable[[float, str], None],
) -> dict[str, Tensor]:
    """Return E[(dL/dy_i)^2] of each linear's outputs: name -> [out] float32.

    L is the sum of a window's negative log-likelihoods, one window at a time; no gradient of a
    parameter is kept.
    head: gathers what it needs on the way.
    """
    sums: dict[str, _Gradients] = {}
    hooks = []
    for index, block in enumerate(blocks):
        for name, module in linears_of(block).items():
            weight = linear_weight(module)
            held = _Gradients(torch.zeros(weight.shape[0], device=weight.device))
            sums[f"{path}.{index}.{name}"] = held
            hooks.append(module.register_forward_hook(_watch(held)))
    embeddings = model.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(_require_gradient))
    if head is not None:
        hooks += head.watch(model)
    windows = [window for batch in batches for window in batch]
    try:
        with _frozen(model), torch.enable_grad(), wide_passes(model.dtype):
            for number, window in enumerate(windows):
                tokens = window[None]
                logits = model(tokens, use_cache=False).logits
                if head is not None:
                    head.add(logits, tokens)
                loss = nn.functional.cross_entropy(
                    logits[0, :-1].float(), tokens[0, 1:], reduction="sum"
                )
                loss.backward()
                on_share(BACKWARD / len(windows), f"gradients, window {number + 1}")
    finally:
        for hook in hooks:
            hook.remove()
    importance = {}
    for name, held in sums.items():
        mean = held.squares.cpu() / max(held.tokens, 1)
        if not torch.isfinite(mean).all():
            raise CalibrationError(
                f"the gradients of {name} are not finite; set allocation.importance=output, or "
                "check model.dtype"
            )
        if mean.sum() > 0:
            importance[name] = at_least(mean)
    for index, block in enumerate(blocks):
        _lend_importance(block, f"{path}.{index}", importance)
    return importance


def _lend_importance(block: nn.Module, where: str, importance: dict[str, Tensor]) -> None:
    """Give the layers of experts that saw no token the mean importance of the others' rows."""
    lists = expert_lists(block)
    for name in linears_of(block):
        place = place_among_experts(name, lists)
        if place is None or f"{where}.{name}" in importance:
            continue
        known = _known(place, len(lists[place.experts]), where, importance)
        if known:
            importance[f"{where}.{name}"] = torch.stack(known).mean(dim=0)


def _known(
    place: ExpertPlace, experts: int, where: str, importance: Mapping[str, Tensor]
) -> list[Tensor]:
    names = (f"{where}.{place.of(index)}" for index in range(experts))
    return [importance[name] for name in names if name in importance]


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
