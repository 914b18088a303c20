"""What a run will take: bits, bytes, memory and time, from the model's config alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from claq_exp.allocate import Allocation, Survey
from claq_exp.calibration.streams import streams_for
from claq_exp.checkpoint.writer import Sizes, bits_beside_layers, planned_sizes
from claq_exp.config import AUTO, ExperimentConfig
from claq_exp.errors import ConfigError
from claq_exp.evaluation.perplexity import windows_at_once
from claq_exp.models.context import context_length
from claq_exp.models.discover import find_blocks, linear_weight, linears_of
from claq_exp.models.experts import expert_lists, place_among_experts
from claq_exp.models.load import DTYPES, stored_dtype
from claq_exp.models.skeleton import skeleton, tied_names
from claq_exp.models.towers import text_config
from claq_exp.payload.base import Layout
from claq_exp.payload.stored import HALF
from claq_exp.quantize.activation.rounding import expected_rounding, needs_text
from claq_exp.quantize.budget import Overhead, fit_budget
from claq_exp.quantize.recipe import Recipe
from claq_exp.run.ends import End, chosen_ends
from claq_exp.run.needs import Needs, needs, wants_stream
from claq_exp.run.stages import Cost, Footprint, Linear, Shape, Times, costs
from claq_exp.system.accelerator import is_cpu
from claq_exp.system.machine import matmul_speed
from claq_exp.system.resources import free_memory
from claq_exp.tensor_files.shards import index_bytes
from claq_exp.train.window import Cost as TuneCost

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Rules of thumb, measured on two CPU cores; `claq-exp plan` promises a factor of two, not more.
FORWARD_EFFICIENCY = 0.7  # of a large matrix product's speed, for a whole forward pass
CALIBRATION_PASSES = 2.5  # forward passes of a block: up to each group, and once through
COLUMN_SECONDS = 40e-6  # to fit and code one column
ENTRY_SECONDS = 60e-9  # and for each of its entries
ROUNDED = 1.5  # forward passes that a pass with rounded activations takes
CORPUS_TOKENS = 300_000  # of a corpus of unknown length, about WikiText-2's test split
TASK_TOKENS = 90  # of a row of a multiple-choice task, all choices together
TASK_START = 8.0  # seconds until lm-eval is ready
HIDDEN_BYTES = 2**30  # of hidden states that are kept as they were computed
HIDDEN_SHARE = 0.25  # of the free memory that hidden states may take


@dataclass(frozen=True)
class Plan:
    """What to expect.

    recipe, allocation: the experiment's strategies, fitted to its budget.
    description: bits that a checkpoint with given layouts takes beside its matrices, at most.
    layouts: linear name -> stored form.  ends: embedding and head, where they are quantized.
    sizes: bytes and bits of the checkpoint.  costs: stage -> what it takes, in order.
    needs: memory and disk by stage.  original_bytes: of the model's weights in 16 bits.
    hidden_dtype, hidden_bytes: of the hidden states between two blocks, of all streams.
    activation_bits: of a number that enters a layer, on average; None where they are not rounded.
    notes: what a person must know of the stored tensors.
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
    costs: dict[str, Cost]
    blocks: int
    parameters: int
    activation_bits: float | None = None
    notes: tuple[str, ...] = ()
    ends: tuple[End, ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Stage -> estimate."""
        return {name: cost.seconds for name, cost in self.costs.items()}


@dataclass(frozen=True)
class _Planned:
    """What is settled of a run before its costs are; checkpoint: its bytes."""

    recipe: Recipe
    survey: Survey | None
    layouts: dict[str, Layout]
    hidden_bytes: int
    checkpoint: int
    ends: tuple[End, ...]


def make_plan(config: ExperimentConfig, model_config: PretrainedConfig, device: str) -> Plan:
    """Plan a run, whose `model.dtype` is settled.

    Raises ConfigError for a model without decoder blocks.
    """
    model = skeleton(model_config)
    path, blocks = find_blocks(model, config.model.blocks)
    shapes = {
        f"{path}.{index}.{name}": _sides(linear_weight(module))
        for index, block in enumerate(blocks)
        for name, module in linears_of(block).items()
    }
    mixture = _Mixture.of(path, blocks, model_config)
    tied = tied_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    parameters = sum(tensor.numel() for tensor in state.values())
    if not shapes:
        raise ConfigError(f"the blocks of {path} hold no linear layers to quantize")
    config.recipe().precision.check_names(shapes)
    ends = chosen_ends(model, *config.end_rules())
    packed_ends = {end.name: end.layout() for end in ends}
    packed = {*shapes, *packed_ends}
    kept = {n: t.numel() for n, t in state.items() if n.removesuffix(".weight") not in packed}

    def description(layouts: Mapping[str, Layout]) -> float:
        return 8.0 * _description_bytes({**layouts, **packed_ends}, kept)

    stored = stored_dtype(model_config)
    beside = bits_beside_layers(model, shapes, packed_ends, stored)
    budget = config.budget.for_layers(parameters, beside, shapes)
    recipe = fit_budget(config.recipe(), budget, shapes, description)
    allocation = config.allocation_rule().within(budget)
    layouts = allocation.planned_layouts(recipe, shapes, description)
    evaluation = config.evaluation
    context = context_length(evaluation.context, model_config) if evaluation.corpora else 0
    rounding = expected_rounding(config.activation_rule(), layouts)
    sizes = planned_sizes(model, {**layouts, **packed_ends}, stored, rounding)
    model_shape = _ModelShape.of(model, blocks, parameters, model_config)
    hidden_dtype, hidden_bytes = _hidden(config, model_shape.width, model_config)
    planned = _Planned(recipe, allocation.survey(), layouts, hidden_bytes, sizes.bytes, ends)
    shape = _shape(config, planned, model_shape, mixture, device, context)
    taken = costs(shape)
    return Plan(
        recipe=recipe,
        allocation=allocation,
        description=description,
        layouts=layouts,
        sizes=sizes,
        original_bytes=2 * parameters,
        needs=needs(taken, streams=shape.streams),
        hidden_dtype=hidden_dtype,
        hidden_bytes=hidden_bytes,
        costs=taken,
        blocks=len(blocks),
        parameters=parameters,
        activation_bits=rounding.bits(w.columns for w in layouts.values()) if rounding else None,
        ends=ends,
    )


@dataclass(frozen=True)
class _Mixture:
    """Which layers are of experts.

    beside: name of such a layer -> number of experts.  routed: how many of them take a token.
    """

    beside: dict[str, int]
    routed: int

    @staticmethod
    def of(path: str, blocks: nn.ModuleList, model_config: PretrainedConfig) -> _Mixture:
        beside = {}
        for index, block in enumerate(blocks):
            lists = expert_lists(block)
            for name in linears_of(block) if lists else ():
                if place := place_among_experts(name, lists):
                    beside[f"{path}.{index}.{name}"] = len(lists[place.experts])
        routed = getattr(text_config(model_config), "num_experts_per_tok", None)
        return _Mixture(beside, routed or max(beside.values(), default=1))

    def share(self, name: str) -> float:
        """Return the share of tokens that reach a layer."""
        return min(1.0, self.routed / self.beside[name]) if name in self.beside else 1.0


def _hidden(
    config: ExperimentConfig, width: int, model_config: PretrainedConfig
) -> tuple[torch.dtype, int]:
    """Return type and bytes of the hidden states between blocks, of all streams."""
    hidden = config.calibration.windows * config.calibration.seqlen * width
    dtype = _hidden_dtype(config, hidden, model_config)
    return dtype, hidden * dtype.itemsize * len(streams_for(config.tuning().wants))


def _hidden_dtype(
    config: ExperimentConfig, hidden: int, model_config: PretrainedConfig
) -> torch.dtype:
    """Return the type of so many hidden values between blocks; see `calibration.keep_in`."""
    keep_in = config.calibration.keep_in
    if keep_in != AUTO:
        return DTYPES[keep_in]
    forward = DTYPES[config.model.dtype]
    if forward.itemsize == 2 or hidden * forward.itemsize <= HIDDEN_BYTES:
        return forward
    stored = stored_dtype(model_config)
    return stored if stored.itemsize == 2 else torch.float16


def _sides(weight: torch.Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


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


@dataclass(frozen=True)
class _ModelShape:
    """Counts of a model: parameters in all, of its largest block, of embedding and head."""

    parameters: int
    block: int
    head: int
    width: int
    vocabulary: int
    blocks: int
    linears: tuple[Linear, ...]

    @staticmethod
    def of(
        model: PreTrainedModel, blocks: nn.ModuleList, parameters: int, config: PretrainedConfig
    ) -> _ModelShape:
        counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
        largest = blocks[counts.index(max(counts))]
        lists = expert_lists(largest)
        linears = []
        for name, module in linears_of(largest).items():
            place = place_among_experts(name, lists)
            experts = len(lists[place.experts]) if place else 1
            linears.append(Linear(*_sides(linear_weight(module)), experts))
        table, last = model.get_input_embeddings(), model.get_output_embeddings()
        return _ModelShape(
            parameters=parameters,
            block=max(counts),
            head=sum(p.numel() for p in last.parameters()) if last else 0,
            width=table.get_parameter("weight").shape[1],
            vocabulary=text_config(config).vocab_size,
            blocks=len(blocks),
            linears=tuple(linears),
        )


def _shape(
    config: ExperimentConfig,
    plan: _Planned,
    model: _ModelShape,
    mixture: _Mixture,
    device: str,
    context: int,
) -> Shape:
    sizes = _sizes(config, plan, model, device, context)
    at_once = sizes.measured(streams=False)
    tasks = bool(config.evaluation.zero_shot)
    return Shape(
        sizes=sizes,
        times=_times(config, plan, model.parameters, mixture, device, context),
        threads=config.threads or torch.get_num_threads(),
        on_gpu=not is_cpu(device),
        streams=wants_stream(config.stream_choice(), at_once, device, tasks=tasks),
        allocates=plan.survey is not None,
        observes=needs_text(config.activation_rule()),
        after=tuple(config.evaluation.after),
    )


def _sizes(
    config: ExperimentConfig, plan: _Planned, model: _ModelShape, device: str, context: int
) -> Footprint:
    size = DTYPES[config.model.dtype].itemsize
    calibration, evaluation = config.calibration, config.evaluation
    measured = max(context, 1) * windows_at_once(
        evaluation.batch_size, max(context, 1), model.vocabulary, device
    )
    tokens = [
        CORPUS_TOKENS if c.windows is None else c.windows * context
        for c in evaluation.corpora.values()
    ]
    logits = measured if evaluation.corpora else TASK_TOKENS * bool(evaluation.zero_shot)
    gradients = plan.survey is not None and plan.survey.gradients
    kept = evaluation.kl_windows
    compared = sum(t if kept is None else min(kept * context, t) for t in tokens)
    batch = calibration.seqlen * model.width
    return Footprint(
        linears=model.linears,
        ends=tuple(Linear(end.rows, end.columns) for end in plan.ends),
        whole=size * model.parameters,
        loaded=size * model.parameters if logits and config.device_map is None else 0,
        block=size * model.block,
        head=size * model.head,
        hidden=min(plan.hidden_bytes, HIDDEN_SHARE * free_memory(device)),
        entering=4.0 * calibration.batch_size * batch * (1 + _tuning(config).states),
        observed=float(size * calibration.windows * batch),
        logits=logits * model.vocabulary,
        streamed_hidden=min(max(tokens, default=0) * model.width * size, HIDDEN_BYTES),
        surveyed=batch * model.blocks if gradients else 0,
        kept_hidden=plan.hidden_bytes,
        checkpoint=plan.checkpoint,
        compared=2.0 * compared * model.vocabulary,
    )


def _tuning(config: ExperimentConfig) -> TuneCost:
    calibration = config.calibration
    return config.tuning().cost(-(-calibration.windows // calibration.batch_size))


def _times(
    config: ExperimentConfig,
    plan: _Planned,
    parameters: int,
    mixture: _Mixture,
    device: str,
    context: int,
) -> Times:
    speed = FORWARD_EFFICIENCY * matmul_speed(device)
    tokens = config.calibration.windows * config.calibration.seqlen
    layouts = plan.layouts
    weights = sum(mixture.share(name) * layout.weights for name, layout in layouts.items())
    # about half of the layers share their input
    squares = sum(mixture.share(name) * w.columns**2 for name, w in layouts.items()) / 2
    passed = parameters - sum(layout.weights for layout in layouts.values()) + weights
    solve = plan.recipe.codebook.relative_cost * sum(
        layout.columns * (COLUMN_SECONDS + ENTRY_SECONDS * layout.rows)
        for layout in layouts.values()
    )
    solve += sum(
        end.columns
        * (COLUMN_SECONDS + ENTRY_SECONDS * end.rows)
        * end.recipe.codebook.relative_cost
        for end in plan.ends
    )
    # factors of the Hessians, and errors that go from each column to those behind it
    compensated = [*layouts.values(), *(end.layout() for end in plan.ends if end.head)]
    solve += sum(w.columns**3 / 2 + w.rows * w.columns**2 for w in compensated) / speed
    evaluation = config.evaluation
    scored = sum(
        context * corpus.windows if corpus.windows else CORPUS_TOKENS
        for corpus in evaluation.corpora.values()
    )
    rows = sum((task.rows or 2000) * TASK_TOKENS for task in evaluation.zero_shot.values())
    evaluate = 2 * (scored + rows) * passed / speed
    evaluate += TASK_START * bool(evaluation.zero_shot)
    squares += sum(end.columns**2 for end in plan.ends if end.head)
    passes = CALIBRATION_PASSES + config.rewriting().passes + _tuning(config).passes
    surveyed = plan.survey.windows * config.calibration.seqlen if plan.survey else 0
    return Times(
        read=2 * parameters / 5e8,
        forward=2 * tokens * passed / speed,
        calibrate=2 * tokens * (passes * weights + squares) / speed,
        solve=solve,
        survey=2 * surveyed * (4 * passed + squares) / speed,
        evaluate=evaluate,
        rounded=1.0 if config.activation_rule().block_format() is None else ROUNDED,
    )


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
    return replace(make_plan(config, original.config, device), notes=tuple(original.remarks()))
