"""What a run will take: bits, bytes, memory and time, from the model's config alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from claq_exp.allocate import Allocation
from claq_exp.calibration.streams import streams_for
from claq_exp.checkpoint.writer import Sizes, bits_beside_layers, planned_sizes
from claq_exp.config import AUTO, ExperimentConfig
from claq_exp.errors import ConfigError
from claq_exp.models.context import context_length
from claq_exp.models.discover import find_blocks, linear_weight, linears_of
from claq_exp.models.load import DTYPES, OPENED, stored_dtype
from claq_exp.models.skeleton import skeleton, tied_names
from claq_exp.payload.base import Layout
from claq_exp.payload.stored import HALF
from claq_exp.quantize.activation.rounding import expected_rounding
from claq_exp.quantize.budget import Overhead, fit_budget
from claq_exp.quantize.moments import CROSS
from claq_exp.quantize.objective import Objective
from claq_exp.quantize.recipe import Recipe
from claq_exp.run.ends import End, planned_ends
from claq_exp.run.needs import Needs, needs
from claq_exp.run.shape import (
    HIDDEN_BYTES,
    Mixture,
    ModelShape,
    Planned,
    shape_of,
    sides,
    states_of_all_blocks,
)
from claq_exp.run.stages import Cost, costs
from claq_exp.run.teacher import check_routes
from claq_exp.system.accelerator import is_cpu
from claq_exp.tensor_files.shards import index_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """What to expect.

    recipe, allocation: the experiment's strategies, fitted to its budget.
    description: bits that a checkpoint with given layouts takes beside its matrices, at most.
    layouts: linear name -> stored form.  ends: embedding and head, where they are quantized.
    sizes: bytes and bits of the checkpoint.  costs: stage -> what it takes, in order.
    needs: memory and disk by stage.  original_bytes: of the model's weights in 16 bits.
    hidden_dtype, hidden_bytes: of the hidden states between two blocks, of all streams.
    states_bytes: of what enters all blocks, of one batch.
    activation_bits: of a number that enters a layer, on average; None where they are not rounded.
    notes: what a person must know of the stored tensors, and `kept_ends`.
    kept_ends: why embedding and head stay in 16 bits where the rules would quantize them.
    """

    recipe: Recipe
    allocation: Allocation
    description: Overhead
    layouts: dict[str, Layout]
    sizes: Sizes
    original_bytes: int
    needs: Needs
    hidden_dtype: torch.dtype
    hidden_bytes: int
    states_bytes: int
    costs: dict[str, Cost]
    blocks: int
    parameters: int
    activation_bits: float | None = None
    notes: tuple[str, ...] = ()
    ends: tuple[End, ...] = ()
    kept_ends: str = ""

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> estimate."""
        return {name: cost.seconds for name, cost in self.costs.items()}


def make_plan(config: ExperimentConfig, model_config: PretrainedConfig, device: str) -> Plan:
    """Plan a run, whose `model.dtype` is settled.

    Raises ConfigError for a model without decoder blocks, or a device that cannot do what is asked.
    """
    if config.calibration.float64 and not is_cpu(device):
        raise ConfigError(
            f"calibration.float64=true is for the CPU, and this run is on {device}; "
            "set device=cpu, or leave calibration.float64=false"
        )
    model = skeleton(model_config)
    path, blocks = find_blocks(model, config.model.blocks)
    shapes = {
        f"{path}.{index}.{name}": sides(linear_weight(module))
        for index, block in enumerate(blocks)
        for name, module in linears_of(block).items()
    }
    mixture = Mixture.of(path, blocks, model_config)
    tied = tied_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    parameters = sum(tensor.numel() for tensor in state.values())
    if not shapes:
        raise ConfigError(f"the blocks of {path} hold no linear layers to quantize")
    config.recipe().precision.check_names(shapes)
    if CROSS in config.recipe().solver.wants:
        for index, block in enumerate(blocks):
            check_routes(block, f"{path}.{index}")
    stored = stored_dtype(model_config)
    fitted = _fitted(config, model, shapes, state, stored)
    layouts, ends = fitted.layouts, fitted.ends
    evaluation = config.evaluation
    context = context_length(evaluation.context, model_config) if evaluation.corpora else 0
    rounding = expected_rounding(config.activation_rule(), layouts)
    packed = {**layouts, **{end.name: end.layout() for end in ends}}
    sizes = planned_sizes(model, packed, stored, rounding)
    objective = config.objective_rule()
    if objective.wants:
        check_weighable(shapes, mixture.beside, objective)
    model_shape = ModelShape.of(model, blocks, parameters, model_config, objective)
    hidden_dtype, hidden_bytes = _hidden(config, model_shape.width, model_config)
    survey = fitted.allocation.survey()
    planned = Planned(fitted.recipe, objective, survey, layouts, hidden_bytes, sizes.bytes, ends)
    shape = shape_of(config, planned, model_shape, mixture, device, context)
    taken = costs(shape)
    return Plan(
        recipe=fitted.recipe,
        allocation=fitted.allocation,
        description=fitted.description,
        layouts=layouts,
        sizes=sizes,
        original_bytes=2 * parameters,
        needs=needs(taken, streams=shape.streams),
        hidden_dtype=hidden_dtype,
        hidden_bytes=hidden_bytes,
        states_bytes=states_of_all_blocks(config, model_shape),
        costs=taken,
        blocks=len(blocks),
        parameters=parameters,
        activation_bits=rounding.bits(w.columns for w in layouts.values()) if rounding else None,
        ends=ends,
        kept_ends=fitted.kept_ends,
    )


def check_weighable(
    shapes: Mapping[str, tuple[int, int]], experts: Collection[str], objective: Objective
) -> None:
    """Raise ConfigError for linears that an objective cannot weigh.

    shapes: name -> (out, in).  experts: names of those of experts.
    """
    if experts:
        raise ConfigError(
            f"{next(iter(experts))} is of an expert, and objective=output_gradient does not follow "
            "tokens to experts yet; set objective=plain"
        )
    for name, (rows, _) in shapes.items():
        if rows % objective.groups:
            raise ConfigError(
                f"objective.groups={objective.groups} does not divide the {rows} rows of {name}; "
                "choose another number of groups"
            )


@dataclass(frozen=True)
class _Fitted:
    """The strategies of a run, fitted to its budget, and what they store; fields as of `Plan`."""

    recipe: Recipe
    allocation: Allocation
    description: Overhead
    layouts: dict[str, Layout]
    ends: tuple[End, ...]
    kept_ends: str


def _fitted(
    config: ExperimentConfig,
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, int]],
    state: Mapping[str, torch.Tensor],
    stored: torch.dtype,
) -> _Fitted:
    """Fit the strategies to the budget.

    shapes: of the linears of blocks.  state: tensors of the model, tied ones once.
    A head whose widths are allocated shares the budget of the linears of blocks.
    """
    ends, kept_ends = planned_ends(model, *config.end_rules(), strict=config.strict)
    fixed = {end.name: end.layout() for end in ends if not end.allocated}
    sharing = {**shapes, **{end.name: (end.rows, end.columns) for end in ends if end.allocated}}
    packed = {*sharing, *fixed}
    kept = {n: t.numel() for n, t in state.items() if n.removesuffix(".weight") not in packed}

    def description(layouts: Mapping[str, Layout]) -> float:
        return 8.0 * _description_bytes({**layouts, **fixed}, kept)

    parameters = sum(tensor.numel() for tensor in state.values())
    beside = bits_beside_layers(model, sharing, fixed, stored)
    budget = config.budget.for_layers(parameters, beside, sharing)
    recipe = fit_budget(config.recipe(), budget, sharing, description)
    allocation = config.allocation_rule().within(budget)
    layouts = allocation.planned_layouts(recipe, sharing, description)
    return _Fitted(
        recipe,
        allocation,
        description,
        {name: layouts[name] for name in shapes},
        tuple(replace(end, expected=layouts.get(end.name)) for end in ends),
        kept_ends,
    )


def _hidden(
    config: ExperimentConfig, width: int, model_config: PretrainedConfig
) -> tuple[torch.dtype, int]:
    """Return type and bytes of the hidden states between blocks, of all streams."""
    hidden = config.calibration.windows * config.calibration.seqlen * width
    dtype = _hidden_dtype(config, hidden, model_config)
    streams = streams_for(config.recipe().solver.wants | config.tuning().wants)
    return dtype, hidden * dtype.itemsize * len(streams)


def _hidden_dtype(
    config: ExperimentConfig, hidden: int, model_config: PretrainedConfig
) -> torch.dtype:
    """Return the type of so many hidden values between blocks; see `calibration.keep_in`."""
    keep_in = config.calibration.keep_in
    if keep_in != AUTO:
        return DTYPES[keep_in]
    forward = OPENED[config.calibrating_dtype]
    if forward.itemsize == 2 or hidden * forward.itemsize <= HIDDEN_BYTES:
        return forward
    stored = stored_dtype(model_config)
    return stored if stored.itemsize == 2 else torch.float16


def _description_bytes(layouts: Mapping[str, Layout], kept: dict[str, int]) -> int:
    """Estimate the bytes of headers, index and the layouts in config.json, rather too many."""
    header = {
        f"{n}.{s}": t for n, layout in layouts.items() for s, t in layout.stored_tensors().items()
    }
    entry = len('"":{"dtype":"F16","shape":[10000,1000],"data_offsets":[100000000,100000000]},')
    names = sum(len(name) + entry for name in [*header, *kept])
    texts = sum(
        len(name) + len(json.dumps(layout.to_json(), indent=6)) + 12
        for name, layout in layouts.items()
    )
    stored = sum(tensor.bits // 8 for tensor in header.values()) + HALF // 8 * sum(kept.values())
    return names + texts + index_bytes([*header, *kept], stored) + 1000


def plan_for(
    config: ExperimentConfig, device: str, say: Callable[[str], None] = lambda _: None
) -> Plan:
    """Fetch a model's config (hub models: nothing but that) and plan its run.

    Stored tensors that are here are looked at, as a run does.
    say: shows a line before something long.
    """
    from claq_exp.models.load import forward_dtype, look_at
    from claq_exp.models.source import model_folder
    from claq_exp.sources.cache import fetch_log
    from claq_exp.tracking.progress import noise_to

    with noise_to(fetch_log()):
        folder: Path = model_folder(config.model, weights=False, say=say)
        remote = config.model.trust_remote_code
        original = look_at(folder, trust_remote_code=remote, strict=config.strict)
    config = config.with_dtype(forward_dtype(config.model.dtype, original.config, device))
    plan = make_plan(config, original.config, device)
    return replace(plan, notes=(*original.remarks(), *filter(None, [plan.kept_ends])))
