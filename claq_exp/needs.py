"""What a run takes of memory and disk, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from claq_exp.accelerator import is_cpu
from claq_exp.errors import ConfigError
from claq_exp.resources import available_memory, free_disk, free_memory

# Measured on two CPU cores, see benchmarks/big_model.py; `claq-exp plan` promises 25 %, not less.
LIBRARIES = 0.62e9  # bytes of Python, PyTorch and the rest before any model is there
ALLOCATOR = 0.10e9  # that are freed and not given back yet
WORK = 2.0  # matrices in float32 while one is quantized: columns, codes, differences
LOGIT_COPIES = 2.0  # of the logits of a batch: as they come, and in float32 for the loss
GRADIENTS = 40  # hidden states of a block that a backward pass keeps
GIB = 2**30


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block.  experts: how many of its kind gather a Hessian at once."""

    rows: int
    columns: int
    experts: int = 1


@dataclass(frozen=True)
class Sizes:
    """What memory is taken by.

    linears: of the largest block.  whole, block, head: bytes in the type of forward passes, of all
    parameters, those of a block, and embedding and head.  hidden: bytes of hidden states between
    blocks; entering: those of one batch in float32.  logits: numbers in those of a batch.
    streamed_hidden: bytes of hidden states while a model is measured block by block.
    tasks: there are tasks to be measured.  surveyed: hidden numbers of a window, times blocks,
    where an allocation looks at gradients; 0 else.  allocates: one looks at the whole model.
    """

    linears: tuple[Linear, ...]
    whole: float
    block: float
    head: float
    hidden: float
    entering: float
    logits: float
    streamed_hidden: float
    tasks: bool
    surveyed: float
    allocates: bool


@dataclass(frozen=True)
class Needs:
    """Bytes by stage in the memory of the machine, and in that of a GPU; bytes of disk.

    streams: the model is read block by block while it is measured.
    """

    host: Mapping[str, float]
    device: Mapping[str, float]
    disk: float
    streams: bool

    @property
    def memory(self) -> int:
        """Bytes of the machine's memory in the largest stage."""
        return int(max(self.host.values()))


def needs(sizes: Sizes, disk: float, device: str, threads: int, stream: bool | str) -> Needs:
    """Say what a run takes, and decide whether the model is streamed while it is measured.

    stream: true, false, or auto for where the whole model would not fit.
    """
    logits = LOGIT_COPIES * 4 * sizes.logits
    at_once = sizes.whole + logits
    in_parts = sizes.block + sizes.head + sizes.streamed_hidden + logits
    on_gpu = not is_cpu(device)
    streams = wants_stream(stream, at_once, device, tasks=sizes.tasks)
    measured = in_parts if streams else at_once
    solved = _solving(sizes.linears, threads)
    quantized = sizes.block + sizes.hidden + sizes.entering
    stages = {"evaluate": measured, "quantize": quantized}
    if sizes.allocates:
        stages["allocate"] = _allocating(sizes)
    base = LIBRARIES + ALLOCATOR
    if not on_gpu:
        stages["quantize"] += solved
        return Needs({k: base + v for k, v in stages.items()}, {}, disk, streams)
    stages["quantize"] += _on_gpu(sizes.linears)
    return Needs({"quantize": base + solved}, stages, disk, streams)


def wants_stream(stream: bool | str, at_once: float, device: str, *, tasks: bool) -> bool:
    """Tell whether to read a model block by block while it is measured.

    stream: true, false, or auto for where the bytes that it takes at once would not fit.
    tasks: there are tasks to be measured, for which lm-eval wants the whole.
    """
    if stream != "auto":
        return stream is True
    room = free_memory(device) - (LIBRARIES if is_cpu(device) else 0)
    return at_once > room and not tasks


def check_needs(found: Needs, device: str, outputs: Path) -> None:
    """Raise ConfigError, with the numbers, where this machine lacks what a run takes."""
    places = [("memory", found.host, available_memory())]
    if found.device:
        places.append((f"memory of {device}", found.device, free_memory(device)))
    for where, stages, free in places:
        stage = max(stages, key=lambda name: stages[name])
        if stages[stage] > free:
            raise ConfigError(
                f"this run takes about {stages[stage] / GIB:.1f} GiB of {where} (to {stage}), and "
                f"{free / GIB:.1f} GiB are free; {_advice(stage, found)}, or set "
                "check_resources=false"
            )
    free = free_disk(outputs)
    if found.disk > free:
        raise ConfigError(
            f"this run takes about {found.disk / GIB:.1f} GiB of disk under {outputs}, and "
            f"{free / GIB:.1f} GiB are free; set outputs=FOLDER, fewer calibration.windows, or "
            "check_resources=false"
        )


def _advice(stage: str, found: Needs) -> str:
    if stage == "evaluate" and not found.streams:
        return "measure no tasks and set stream=true, or evaluation=none"
    if stage == "allocate":
        return "use allocation=none with another precision"
    return "use fewer calibration.windows or a smaller calibration.batch_size"


def _solving(linears: Iterable[Linear], threads: int) -> float:
    """Return the bytes that Hessians and the linears that share one take on the CPU."""
    most = 0.0
    shared: dict[int, list[int]] = {}
    for linear in linears:
        shared.setdefault(linear.columns, []).append(linear.rows * linear.columns)
        most = max(most, 8.0 * linear.columns**2 * linear.experts)
    for columns, weights in shared.items():
        together = sorted(weights, reverse=True)[: max(1, threads)]
        most = max(most, 4.0 * columns**2 + WORK * 4 * sum(together))
    return most


def _on_gpu(linears: Iterable[Linear]) -> float:
    """Return the bytes of a group on a GPU: Hessian, factor and inverse, and its columns."""
    return max(24.0 * linear.columns**2 + 12.0 * linear.rows * linear.columns for linear in linears)


def _allocating(sizes: Sizes) -> float:
    hessians = sum(8.0 * columns**2 for columns in {li.columns for li in sizes.linears})
    return sizes.whole + hessians + 4.0 * GRADIENTS * sizes.surveyed
