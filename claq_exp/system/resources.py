"""How much memory, disk and how many cores this process may take."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
from pathlib import Path

import psutil

CONTROL_GROUPS = (  # limit and use of a container, in the two forms that Linux has
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Return the bytes of memory that this process may still take.

    What the machine has left, the limit of a container, and that of the process (`ulimit -v`).
    """
    left = [psutil.virtual_memory().available]
    for limit, used in CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
            left.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    limit_of_process, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_of_process != resource.RLIM_INFINITY:
        left.append(limit_of_process - psutil.Process().memory_info().vms)
    return max(0, min(left))


def free_memory(device: str) -> int:
    """Return the bytes that may still be taken of a device's memory, be it a GPU's."""
    from claq_exp.system import accelerator

    return (
        available_memory() if accelerator.is_cpu(device) else accelerator.free_and_total(device)[0]
    )


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def peak_memory() -> int:
    """Return the largest resident size of this process, in bytes, since `reset_peak`."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    peak_since_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_since_start if sys.platform == "darwin" else peak_since_start * 1024


def reset_peak() -> None:
    """Have `peak_memory` count from here, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
