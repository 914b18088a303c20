"""What a run takes of memory and disk, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from claq_exp.errors import ConfigError
from claq_exp.run.stages import STAGES, Cost
from claq_exp.system.accelerator import is_cpu
from claq_exp.system.resources import available_memory, free_disk, free_memory

# Measured on two CPU cores, see benchmarks/big_model.py; `claq-exp plan` promises 25 %, not less.
LIBRARIES = 0.62e9  # bytes of Python, PyTorch and the rest before any model is there
ALLOCATOR = 0.10e9  # that are freed and not given back yet
GIB = 2**30


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
        return int(max(self.host.values(), default=LIBRARIES + ALLOCATOR))


def needs(costs: Mapping[str, Cost], *, streams: bool) -> Needs:
    """Sum up what the stages of a run take."""
    base = LIBRARIES + ALLOCATOR
    return Needs(
        host={name: base + cost.host for name, cost in costs.items() if cost.host},
        device={name: cost.device for name, cost in costs.items() if cost.device},
        disk=sum(cost.disk for cost in costs.values()),
        streams=streams,
    )


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
        stage = max(stages, key=lambda name: stages[name], default="")
        if stage and stages[stage] > free:
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
    (advice,) = (known.advice for known in STAGES if known.name == stage)
    return advice[found.streams]
