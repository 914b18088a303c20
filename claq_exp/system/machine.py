"""The machine that a run has: device, speed, memory, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from claq_exp.errors import ConfigError
from claq_exp.system import accelerator
from claq_exp.system.resources import cores
from claq_exp.system.torchrun import place

ROUNDING = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA")  # what else chooses the kernels of matrix products
PACKAGES = ("claq-exp", "torch", "transformers", "lm-eval", "numba", "numpy", "datasets")


def choose_device(wanted: str) -> str:
    """Return the device for forward passes; of several processes, each has a GPU of its own.

    Raises ConfigError when it is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    here = place()
    if accelerator.is_cpu(wanted):
        return wanted
    kind, _, index = wanted.partition(":")
    if here.local_size > 1:
        if index:
            raise ConfigError(
                f"device={wanted} is one for {here.local_size} processes; give {kind}"
            )
        index = str(here.local_rank)
        wanted = f"{kind}:{index}"
    there = accelerator.count(kind)
    if int(index or 0) >= there:
        raise ConfigError(f"device={wanted}: this machine has {there} {kind.upper()} devices")
    return wanted


def settle(seed: int, threads: int | None) -> None:
    """Give every run the same start: seeds, TF32 off, thread count.

    threads: None for PyTorch's default, or an equal part of the cores for each of several
    processes.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    processes = place().local_size
    if threads is None and processes > 1:  # torchrun's own default is one thread
        threads = max(1, cores() // processes)
    torch.set_num_threads(threads or torch.get_num_threads())  # said once, it is not MKL's choice


def matmul_speed(device: str) -> float:
    """Return measured float32 multiply-adds per second, counted as two operations each.

    Takes about a tenth of a second.
    """
    left, right = torch.randn(1024, 768, device=device), torch.randn(768, 1536, device=device)

    def seconds(repeats: int) -> float:
        accelerator.synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            product = left @ right
        product.sum().item()  # waits for the device
        return time.perf_counter() - started

    seconds(1)  # the first product of a process starts threads or loads a library
    repeats = min(20, 1 + int(0.1 / seconds(1)))
    return repeats * 2 * 1024 * 768 * 1536 / seconds(repeats)


def versions() -> dict[str, str]:
    """Return package -> version, with Python's own."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: str) -> str:
    """Return what a reader of results needs to know of the device.

    Scores are kept by it: another processor rounds the same products differently, and so do other
    instructions of the same one.
    """
    if not accelerator.is_cpu(device):
        return accelerator.name(device)
    chosen = [torch.backends.cpu.get_cpu_capability()]
    chosen += [f"{name}={os.environ[name]}" for name in ROUNDING if name in os.environ]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"CPU, {threads}, {_processor()}, {', '.join(chosen)}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the commit of the source tree, marked when it has changes; None outside git."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
