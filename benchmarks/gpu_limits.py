"""Measure what a GPU can do at most: the bytes of a large copy, the operations of large products.

    python benchmarks/gpu_limits.py

The other GPU benchmarks hold their own figures against the same two measures.  Exits with code 2
where there is no GPU.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys

import torch
from common import command_line, device_option, note, parse
from device_time import PRODUCT, Stopwatch, usable

PACKAGES = ("torch", "triton", "transformers", "numpy", "numba")


def facts(device: str) -> dict[str, str | int]:
    """Return what a reader of figures must know of the machine and its software."""
    found: dict[str, str | int] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["CUDA"] = torch.version.cuda or torch.version.hip or "none"
    if device == "cpu":
        return {"device": f"CPU, interpreted ({platform.machine()})", "driver": "none", **found}
    about = torch.cuda.get_device_properties(0)
    return {
        "device": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_bytes": about.total_memory,
        "driver": driver(),
        **found,
    }


def driver() -> str:
    """Return the driver's version, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def main() -> int:
    """Measure and print; return the exit code."""
    parser = command_line(__doc__)
    device_option(parser)
    parser.add_argument("--rounds", type=int, default=20, help="of each (20)")
    asked = parse(parser, rounds=1)
    if not usable(asked, "copies and products"):
        return 2
    note(asked, what="machine", **facts(asked.device))
    watch = Stopwatch(torch.device(asked.device), asked.rounds, asked.quick)
    rate = watch.bandwidth()
    print(f"copy               {1e-12 * rate:8.3f} TB/s, reads and writes together")
    note(asked, what="copy", bytes_per_s=rate)
    for dtype in PRODUCT:
        operations = watch.operations(dtype)
        name = str(dtype).removeprefix("torch.")
        print(f"product, {name:9} {1e-12 * operations:8.2f} TFLOP/s", flush=True)
        note(asked, what=name, operations_per_s=operations)
    return 0


if __name__ == "__main__":
    sys.exit(main())
