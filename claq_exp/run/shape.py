"""The shape of a run: all that its costs follow from, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from claq_exp.allocate import Survey
from claq_exp.config import ExperimentConfig
from claq_exp.evaluation.perplexity import windows_at_once
from claq_exp.models.discover import linear_weight, linears_of
from claq_exp.models.experts import expert_lists, place_among_experts
from claq_exp.models.load import DTYPES, OPENED
from claq_exp.models.towers import text_config
from claq_exp.payload.base import Layout
from claq_exp.quantize.activation.rounding import needs_text
from claq_exp.quantize.moments import CROSS
from claq_exp.quantize.objective import PLAIN, Objective
from claq_exp.quantize.recipe import Recipe
from claq_exp.run.ends import End
from claq_exp.run.needs import wants_stream
from claq_exp.run.stages import GRADIENTS, Footprint, Linear, Shape, Times
from claq_exp.system.accelerator import is_cpu
from claq_exp.system.machine import matmul_speed
from claq_exp.system.resources import free_memory
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
BACKWARD_PASSES = 3.5  # forward passes that finding output gradients takes
LOSS_COPIES = 4.0  # of a window's logits: in their type, float32, as probabilities, the gradient
HIDDEN_BYTES = 2**30  # of hidden states that are kept as they were computed
HIDDEN_SHARE = 0.25  # of the free memory that hidden states may take


@dataclass(frozen=True)
class Planned:
    """What is settled of a run before its costs are; checkpoint: its bytes."""

    recipe: Recipe
    objective: Objective
    survey: Survey | None
    layouts: dict[str, Layout]
    hidden_bytes: int
    checkpoint: int
    ends: tuple[End, ...]


@dataclass(frozen=True)
class Mixture:
    """Which layers are of experts.

    beside: name of such a layer -> number of experts.  routed: how many of them take a token.
    """

    beside: dict[str, int]
    routed: int

    @staticmethod
    def of(path: str, blocks: nn.ModuleList, model_config: PretrainedConfig) -> Mixture:
        """Look at the experts of all blocks, which are at `path`."""
        beside = {}
        for index, block in enumerate(blocks):
            lists = expert_lists(block)
            for name in linears_of(block) if lists else ():
                if place := place_among_experts(name, lists):
                    beside[f"{path}.{index}.{name}"] = len(lists[place.experts])
        routed = getattr(text_config(model_config), "num_experts_per_tok", None)
        return Mixture(beside, routed or max(beside.values(), default=1))

    def share(self, name: str) -> float:
        """Return the share of tokens that reach a layer."""
        return min(1.0, self.routed / self.beside[name]) if name in self.beside else 1.0


def sides(weight: torch.Tensor) -> tuple[int, int]:
    """Return rows and columns."""
    return weight.shape[0], weight.shape[1]


@dataclass(frozen=True)
class ModelShape:
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
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        parameters: int,
        config: PretrainedConfig,
        objective: Objective = PLAIN,
    ) -> ModelShape:
        """Count a model, which may be on the meta device.

        objective: linears that receive the same share no Hessian where it weighs their tokens.
        """
        counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
        largest = blocks[counts.index(max(counts))]
        lists = expert_lists(largest)
        linears = []
        for name, module in linears_of(largest).items():
            place = place_among_experts(name, lists)
            hessians = len(lists[place.experts]) if place else 1
            shape = sides(linear_weight(module))
            if objective.wants:
                hessians *= objective.groups * _neighbours(largest, name, shape[1])
            linears.append(Linear(*shape, hessians))
        table, last = model.get_input_embeddings(), model.get_output_embeddings()
        return ModelShape(
            parameters=parameters,
            block=max(counts),
            head=sum(p.numel() for p in last.parameters()) if last else 0,
            width=table.get_parameter("weight").shape[1],
            vocabulary=text_config(config).vocab_size,
            blocks=len(blocks),
            linears=tuple(linears),
        )


def _neighbours(block: nn.Module, name: str, columns: int) -> int:
    """Count the linears beside one that may receive what it receives, and itself."""
    above = name.rpartition(".")[0]
    return sum(
        other.rpartition(".")[0] == above and linear_weight(module).shape[1] == columns
        for other, module in linears_of(block).items()
    )


def shape_of(
    config: ExperimentConfig,
    plan: Planned,
    model: ModelShape,
    mixture: Mixture,
    device: str,
    context: int,
) -> Shape:
    """Gather all that the costs of a run follow from.

    context: tokens of a window that is measured.
    """
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
    config: ExperimentConfig, plan: Planned, model: ModelShape, device: str, context: int
) -> Footprint:
    size, measuring = _itemsize(config), DTYPES[config.model.dtype].itemsize
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
        loaded=measuring * model.parameters if logits and config.device_map is None else 0,
        block=size * model.block,
        head=size * model.head,
        hidden=min(plan.hidden_bytes, HIDDEN_SHARE * free_memory(device)),
        entering=max(4.0, size) * calibration.batch_size * batch * (1 + _tuning(config).states),
        observed=float(size * calibration.windows * batch),
        beside=_beside(config, plan, model),
        work=plan.recipe.solver.work,
        groups=plan.objective.groups,
        weighed=_weighed(config, plan, model, device),
        kept_weights=4.0 * calibration.windows * calibration.seqlen * _weights(plan),
        logits=logits * model.vocabulary,
        streamed_hidden=min(max(tokens, default=0) * model.width * measuring, HIDDEN_BYTES),
        surveyed=batch * model.blocks if gradients else 0,
        kept_hidden=plan.hidden_bytes,
        checkpoint=plan.checkpoint,
        compared=2.0 * compared * model.vocabulary,
    )


def _itemsize(config: ExperimentConfig) -> int:
    """Return the bytes of a number in forward passes while quantizing."""
    return OPENED[config.calibrating_dtype].itemsize


def _beside(config: ExperimentConfig, plan: Planned, model: ModelShape) -> float:
    """Return the bytes of an original block, and of what enters a linear of both, if wanted."""
    if CROSS not in plan.recipe.solver.wants:
        return 0.0
    tokens = config.calibration.batch_size * config.calibration.seqlen
    widest = max(linear.columns for linear in model.linears)
    size = _itemsize(config)
    return float(size * model.block + 2 * size * tokens * widest)


def states_of_all_blocks(config: ExperimentConfig, model: ModelShape) -> int:
    """Return the bytes of what enters all blocks, and what leaves the last, of one batch."""
    calibration, size = config.calibration, _itemsize(config)
    batch = min(calibration.batch_size, calibration.windows) * calibration.seqlen * model.width
    return size * batch * (model.blocks + 1)


def _weighed(config: ExperimentConfig, plan: Planned, model: ModelShape, device: str) -> float:
    """Return the bytes of a backward pass beside a block: states, its graph, or a window's logits.

    States of as many batches are in memory as have room.
    """
    if not plan.objective.wants:
        return 0.0
    calibration = config.calibration
    states = states_of_all_blocks(config, model)
    batches = -(-calibration.windows // calibration.batch_size)
    held = max(min(HIDDEN_SHARE * free_memory(device), float(states * batches)), float(states))
    graph = 4.0 * GRADIENTS * calibration.batch_size * calibration.seqlen * model.width
    logits = 4.0 * LOSS_COPIES * calibration.seqlen * model.vocabulary
    return held + max(graph, logits)


def _weights(plan: Planned) -> int:
    """Return how many weights a token has."""
    return plan.objective.groups * len(plan.layouts) if plan.objective.wants else 0


def _tuning(config: ExperimentConfig) -> TuneCost:
    calibration = config.calibration
    return config.tuning().cost(-(-calibration.windows // calibration.batch_size))


def _times(
    config: ExperimentConfig,
    plan: Planned,
    parameters: int,
    mixture: Mixture,
    device: str,
    context: int,
) -> Times:
    speed = FORWARD_EFFICIENCY * matmul_speed(device)
    calibrating = speed / 2 if config.calibration.float64 else speed
    tokens = config.calibration.windows * config.calibration.seqlen
    layouts = plan.layouts
    weights = sum(mixture.share(name) * layout.weights for name, layout in layouts.items())
    groups = plan.objective.groups if plan.objective.wants else 1
    # about half of the layers share their input, and with it the Hessian if tokens count alike
    apart = groups if plan.objective.wants else 0.5
    squares = sum(mixture.share(name) * w.columns**2 for name, w in layouts.items()) * apart
    passed = parameters - sum(layout.weights for layout in layouts.values()) + weights
    coded = plan.recipe.solver.passes
    solve = (
        coded
        * plan.recipe.codebook.relative_cost
        * sum(
            layout.columns * (COLUMN_SECONDS + ENTRY_SECONDS * layout.rows)
            for layout in layouts.values()
        )
    )
    solve += sum(
        end.columns
        * (COLUMN_SECONDS + ENTRY_SECONDS * end.rows)
        * end.recipe.codebook.relative_cost
        for end in plan.ends
    )
    # factors of the Hessians, and errors that go from each column to those behind it
    compensated = [*layouts.values(), *(end.layout() for end in plan.ends if end.head)]
    solve += sum(groups * w.columns**3 / 2 + w.rows * w.columns**2 for w in compensated) / speed
    solve += (coded - 1) * sum(2 * w.rows * w.columns**2 for w in layouts.values()) / speed
    crossed = CROSS in plan.recipe.solver.wants
    if crossed:  # corrections, shifts and losses
        solve += sum(w.columns**3 + 2 * w.rows * w.columns**2 for w in layouts.values()) / speed
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
    passes += CALIBRATION_PASSES * crossed  # the original block goes the same ways
    moments = squares * (3 if crossed else 1)  # a cross moment is not symmetric
    surveyed = plan.survey.windows * config.calibration.seqlen if plan.survey else 0
    return Times(
        read=2 * parameters / 5e8,
        forward=2 * tokens * passed / speed,
        calibrate=2 * tokens * (passes * weights + moments) / calibrating,
        solve=solve,
        survey=2 * surveyed * (4 * passed + squares) / calibrating,
        evaluate=evaluate,
        weigh=_weighing_seconds(config, plan, passed, parameters, calibrating),
        rounded=1.0 if config.activation_rule().block_format() is None else ROUNDED,
    )


def _weighing_seconds(
    config: ExperimentConfig, plan: Planned, passed: float, parameters: int, speed: float
) -> float:
    """Return the seconds of a pass forth and back, in which each block runs forth twice."""
    if not plan.objective.wants:
        return 0.0
    tokens = config.calibration.windows * config.calibration.seqlen
    return 2 + 2 * 2 * parameters / 5e8 + 2 * tokens * BACKWARD_PASSES * passed / speed
