"""The stages of a run, in order: what each works on at a time, and what it takes.

`plan`, the check of memory and disk, the progress bar, the runner and the timings of results.json
go by this list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

# Rules of thumb, measured on two CPU cores; `claq-exp plan` promises a factor of two for times and
# 25 % for memory (benchmarks/big_model.py), not less.
WORK = 2.0  # matrices in float32 while one is quantized: columns, codes, differences
COPY = 1.0  # and the weight itself, of an embedding or head
UNPACKED = 5.0  # bytes of a weight while an embedding or head is dequantized: float32, and codes
LOGIT_COPIES = 2.0  # of the logits of a batch: as they come, and in float32 for the loss
GRADIENTS = 40  # hidden states of a block that a backward pass keeps
TRIALS = 3.0  # fits of an allocation over the model, in column loops
FEWER = "use fewer calibration.windows or a smaller calibration.batch_size"


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.

    hessians: how many are gathered at once of its shape: one for each expert, and, where tokens do
    not weigh alike, one for each group of rows of every linear beside it.
    """

    rows: int
    columns: int
    hessians: int = 1


@dataclass(frozen=True)
class Footprint:
    """What memory and disk are taken by.

    linears: of the largest block.  ends: embedding and head, where they are quantized.
    whole, block, head: bytes in the type of forward passes, of all parameters, those of a block,
    and embedding and head.  loaded: `whole` where a model in memory is measured on one device.
    hidden: bytes of hidden states between blocks in memory; entering: those of a batch in float32;
    observed: those of all batches as they are computed.
    beside: bytes of an original block and of what enters its linears, where a solver compares them
    with the quantized block's.  logits: numbers in those of a batch.
    work: a solver's float32 matrices [in, in] and [out, in] beside those of a column loop.
    groups: of rows, each with a Hessian of its own.
    weighed: bytes of a pass back through the model, which finds what tokens weigh; kept_weights:
    bytes of what it finds, on disk.
    streamed_hidden: bytes of hidden states while a model is measured block by block.
    surveyed: hidden numbers of a window, times blocks, where an allocation looks at gradients.
    kept_hidden, checkpoint, compared: bytes on disk, of hidden states, of the checkpoint and of the
    original's logits.
    """

    linears: tuple[Linear, ...]
    whole: float
    loaded: float
    block: float
    head: float
    hidden: float
    entering: float
    observed: float
    beside: float
    logits: float
    streamed_hidden: float
    surveyed: float
    kept_hidden: float
    checkpoint: float
    compared: float
    ends: tuple[Linear, ...] = ()
    work: tuple[float, float] = (0.0, 0.0)
    groups: int = 1
    weighed: float = 0.0
    kept_weights: float = 0.0

    def measured(self, *, streams: bool) -> float:
        """Return the bytes of a model that is measured, whole or block by block."""
        logits = LOGIT_COPIES * 4 * self.logits
        unpacked = UNPACKED * max((end.rows * end.columns for end in self.ends), default=0)
        if streams:
            return self.block + self.head + self.streamed_hidden + max(logits, unpacked)
        return self.loaded + max(logits, unpacked if self.loaded else 0.0)


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of a run.

    read: all weights, once.  forward: all calibration tokens through the model, once.
    calibrate: the passes of all blocks, and their Hessians.  solve: factors and column loops.
    survey: what an allocation asks of the original.  evaluate: all corpora and tasks.
    rounded: how many times as long it takes with rounded activations.
    weigh: the calibration tokens through the model and back.
    """

    read: float
    forward: float
    calibrate: float
    solve: float
    survey: float
    evaluate: float
    rounded: float
    weigh: float = 0.0


@dataclass(frozen=True)
class Shape:
    """All that the costs of a run follow from.

    on_gpu: forward passes run there.  streams: the model is read block by block while it is
    measured.  allocates, observes: an allocation, or the rounding of activations, looks at the
    original.  after: stages after which the model is measured too.
    """

    sizes: Footprint
    times: Times
    threads: int
    on_gpu: bool
    streams: bool
    allocates: bool
    observes: bool
    after: tuple[str, ...] = ()

    def cost(
        self, seconds: float, forward: float = 0.0, solved: float = 0.0, **more: float
    ) -> Cost:
        """Return a cost whose bytes of forward passes are where those run.

        solved: bytes beside them on the CPU, wherever passes run.
        """
        if self.on_gpu:
            return Cost(seconds, host=solved, device=forward, **more)
        return Cost(seconds, host=forward + solved, **more)


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes of the machine's memory, of a device's, and of disk."""

    seconds: float
    host: float = 0.0
    device: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    unit: what a kill costs at most, of this stage: a window of blocks, the batches of text that are
    in memory at once, or the stage on the model.
    timings: the fields of results.json that its seconds go to; where there are several, its units
    report them themselves.
    cost: None where a run has no such stage.  advice: what to do where memory is short; the second
    where the model is read block by block already.
    """

    name: str
    unit: Literal["window", "batch", "model"]
    timings: tuple[str, ...]
    cost: Callable[[Shape], Cost | None]
    advice: tuple[str, str] = (FEWER, FEWER)


def _load(shape: Shape) -> Cost:
    return Cost(2 + shape.times.read)


def _evaluate_original(shape: Shape) -> Cost:
    taken = shape.sizes.measured(streams=shape.streams)
    return shape.cost(shape.times.evaluate, taken, disk=shape.sizes.compared)


def _weigh(shape: Shape) -> Cost | None:
    if not shape.times.weigh:
        return None
    sizes = shape.sizes
    taken = sizes.block + sizes.head + sizes.weighed
    return shape.cost(shape.times.weigh, taken, disk=sizes.kept_weights)


def _allocate(shape: Shape) -> Cost | None:
    if not shape.allocates:
        return None
    sizes = shape.sizes
    hessians = sum(8.0 * columns**2 for columns in {li.columns for li in sizes.linears})
    if shape.times.weigh:
        hessians = sum(8.0 * sizes.groups * li.columns**2 for li in sizes.linears)
    taken = sizes.whole + hessians + 4.0 * GRADIENTS * sizes.surveyed
    return shape.cost(shape.times.survey + TRIALS * shape.times.solve, taken)


def _quantize(shape: Shape) -> Cost:
    sizes, seconds = shape.sizes, shape.times.calibrate + shape.times.solve
    passed = sizes.block + sizes.hidden + sizes.entering + sizes.beside
    crossed = sizes.beside > 0
    if shape.on_gpu:
        linears = _on_gpu(sizes.linears, crossed=crossed, work=sizes.work)
        passed += max(linears, _on_gpu(sizes.ends, crossed=False))
    solved = max(
        _solving(sizes.linears, shape.threads, sizes.groups, crossed=crossed, work=sizes.work),
        _solving(sizes.ends, 1, work=(0.0, COPY)),
    )
    return shape.cost(seconds, passed, solved, disk=2 * sizes.kept_hidden + sizes.checkpoint)


def _evaluate_after_quantize(shape: Shape) -> Cost | None:
    if QUANTIZE.name not in shape.after:
        return None
    sizes, times = shape.sizes, shape.times
    taken = sizes.measured(streams=shape.streams)
    return shape.cost(3 + 2 * times.read + times.evaluate, taken, disk=sizes.checkpoint)


def _activations(shape: Shape) -> Cost | None:
    if not shape.observes:
        return None
    taken = shape.sizes.block + shape.sizes.observed + shape.sizes.entering
    return shape.cost(shape.times.read + shape.times.forward, taken)


def _export(shape: Shape) -> Cost:
    return Cost(1 + shape.times.read, disk=shape.sizes.checkpoint)


def _evaluate_quantized(shape: Shape) -> Cost:
    taken = shape.sizes.measured(streams=shape.streams)
    return shape.cost(2 + shape.times.read + shape.times.rounded * shape.times.evaluate, taken)


def _solving(
    linears: Iterable[Linear],
    threads: int,
    groups: int = 1,
    *,
    crossed: bool = False,
    work: tuple[float, float] = (0.0, 0.0),
) -> float:
    """Return the bytes that Hessians and the linears that share one take on the CPU.

    groups: of rows.
    crossed: there is a cross moment beside each, and then a correction beside its factor.
    work: float32 matrices [in, in] and [out, in] beside those of a column loop.
    """
    most, matrices = 0.0, 1 + crossed
    shared: dict[int, list[int]] = {}
    for linear in linears:
        shared.setdefault(linear.columns, []).append(linear.rows * linear.columns)
        most = max(most, 8.0 * matrices * linear.columns**2 * linear.hessians)
    for columns, weights in shared.items():
        together = sorted(weights, reverse=True)[: max(1, threads)]
        squares = 4.0 * (matrices + work[0]) * groups * columns**2
        most = max(most, squares + (WORK + work[1]) * 4 * sum(together))
    return most


def _on_gpu(
    linears: Iterable[Linear], *, crossed: bool, work: tuple[float, float] = (0.0, 0.0)
) -> float:
    """Return the bytes of a group on a GPU: Hessian, factor and inverse, and its columns.

    crossed, work: as of `_solving`.
    """
    square, matrices = 24.0 + 12.0 * crossed + 4 * work[0], 12.0 + 4 * work[1]
    taken = (square * li.columns**2 + matrices * li.rows * li.columns for li in linears)
    return max(taken, default=0.0)


SMALLER = ("measure no tasks and set stream=true, or evaluation=none", FEWER)
OTHER_RULE = "use allocation=none with another precision"
LOAD = Stage("load", "model", ("load",), _load)
EVALUATE_ORIGINAL = Stage("evaluate original", "model", ("evaluate",), _evaluate_original, SMALLER)
WEIGH = Stage("output gradients", "batch", ("gradients",), _weigh)
ALLOCATE = Stage("allocate", "model", ("allocate",), _allocate, (OTHER_RULE, OTHER_RULE))
QUANTIZE_TIMINGS = ("transform", "calibrate", "hessian", "solve", "tune")
QUANTIZE = Stage("quantize", "window", QUANTIZE_TIMINGS, _quantize)
EVALUATE_AFTER_QUANTIZE = Stage(
    "evaluate after quantize", "model", ("evaluate",), _evaluate_after_quantize, SMALLER
)
ACTIVATIONS = Stage("activations", "model", ("activations",), _activations)
EXPORT = Stage("export", "model", ("export",), _export)
EVALUATE_QUANTIZED = Stage(
    "evaluate quantized", "model", ("evaluate",), _evaluate_quantized, SMALLER
)
STAGES = (
    LOAD,
    EVALUATE_ORIGINAL,
    WEIGH,
    ALLOCATE,
    QUANTIZE,
    EVALUATE_AFTER_QUANTIZE,
    ACTIVATIONS,
    EXPORT,
    EVALUATE_QUANTIZED,
)
TIMINGS = tuple(dict.fromkeys(timing for stage in STAGES for timing in stage.timings))


def costs(shape: Shape) -> dict[str, Cost]:
    """Return what each stage of a run takes, by its name and in order."""
    found = {stage.name: stage.cost(shape) for stage in STAGES}
    return {name: cost for name, cost in found.items() if cost is not None}
