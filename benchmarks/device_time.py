"""How long work takes on a GPU, and how much the same GPU could do at most.

Limits are measured where they are used and never looked up: a large copy for the bandwidth, a large
square product for the operations.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

COPY_BYTES = 1 << 30
FLUSH_BYTES = 1 << 28  # several times the L2 cache of a data-centre GPU
PRODUCT = {torch.bfloat16: 8192, torch.float32: 8192, torch.float64: 4096}  # side of the square
MOST_ROUNDS = 20  # of a copy or a large product
QUICK_BYTES, QUICK_SIDE = 1 << 16, 64


def device_objection(asked: argparse.Namespace, about: str) -> str | None:
    """Say in a line why the device cannot be used, or None."""
    if asked.device == "cuda" and not torch.cuda.is_available():
        return f"no CUDA device: this benchmark times {about} on a GPU; run it on a GPU"
    if asked.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "--device cpu is for Triton's interpreter: set TRITON_INTERPRET=1, and add --quick"
    return None


def usable(asked: argparse.Namespace, about: str) -> bool:
    """Say on stderr why the device cannot be used, or print what it is."""
    if objection := device_objection(asked, about):
        print(objection, file=sys.stderr)
        return False
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU, interpreted"
    print(f"{name}, torch {torch.__version__}")
    return True


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Stopwatch:
    """Times work that is repeated `rounds` times, with a cold L2 cache before each.

    On a GPU the work is recorded as a CUDA graph.  quick: small sizes for the limits.
    """

    device: torch.device
    rounds: int
    quick: bool = False
    _flush: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = QUICK_BYTES if self.quick else FLUSH_BYTES
        self._flush = torch.empty(size, dtype=torch.uint8, device=self.device)

    def microseconds(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return (fastest, median)."""
        return self._measure(work, self.rounds)

    def bandwidth(self) -> float:
        """Return the bytes per second of a large copy, reads and writes together."""
        size = QUICK_BYTES if self.quick else COPY_BYTES
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        fastest, _ = self._measure(lambda: target.copy_(source), min(self.rounds, MOST_ROUNDS))
        return 2 * size / (1e-6 * fastest)

    def operations(self, dtype: torch.dtype) -> float:
        """Return the operations per second of a large product, a multiply-add being two.

        float32 is full float32: TF32 is off unless somebody has turned it on.
        """
        side = QUICK_SIDE if self.quick else PRODUCT[dtype]
        left, right = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        target = torch.empty_like(left)
        fastest, _ = self._measure(
            lambda: torch.mm(left, right, out=target), min(self.rounds, MOST_ROUNDS)
        )
        return 2 * side**3 / (1e-6 * fastest)

    def _measure(self, work: Callable[[], object], rounds: int) -> tuple[float, float]:
        spent = (self._on_gpu if self.device.type == "cuda" else self._on_cpu)(work, rounds)
        return min(spent), statistics.median(spent)

    def _on_gpu(self, work: Callable[[], object], rounds: int) -> list[float]:
        graph = record(work)
        pairs = []
        for _ in range(rounds):
            self._flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]

    def _on_cpu(self, work: Callable[[], object], rounds: int) -> list[float]:
        spent = []
        for _ in range(rounds):
            started = time.perf_counter()
            work()
            spent.append(1e6 * (time.perf_counter() - started))
        return spent


def record(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Compile and warm up, then record one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
