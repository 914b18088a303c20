"""What of the machine a job may use beside others: one GPU of several, some of the threads."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch

from claq_exp.system.resources import cores

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOOK_SECONDS = 0.5  # between two looks for a free GPU
SCHEDULED = ("SlurmLauncher", "RayLauncher", "RayAWSLauncher")  # these give a job its own GPUs


@contextlib.contextmanager
def one_gpu(
    device: str, launcher: str, check: Callable[[], None] = lambda: None
) -> Iterator[dict[str, str]]:
    """Hold a free GPU of this machine, and give the environment in which a job sees no other.

    Nothing is held where there is nothing to share: on a CPU, with a device that was named, with
    one GPU, or where the launcher has given the job its own.  Waits while all are held; `check` is
    called meanwhile, and may raise.
    """
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if len(gpus) < 2 or launcher.rpartition(".")[2] in SCHEDULED:
        yield {}
        return
    gpu, lock = _free_gpu(gpus, check)
    try:
        yield {VISIBLE: gpu}
    finally:
        lock.release()


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    chosen = os.environ.get(VISIBLE)
    if chosen is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]


def _free_gpu(gpus: list[str], check: Callable[[], None]) -> tuple[str, filelock.BaseFileLock]:
    folder = _lock_folder()
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for gpu in gpus:
            lock = filelock.FileLock(folder / f"gpu-{gpu.replace('/', '_')}.lock")
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=0)
                return gpu, lock
        check()
        time.sleep(LOOK_SECONDS)


def _lock_folder() -> Path:
    """Return a folder of this machine and person; in a Slurm job, where GPUs have other numbers,
    of that job."""
    part = os.environ.get("SLURM_JOB_ID", "")
    return Path(tempfile.gettempdir()) / f"claq_exp-{os.getuid()}" / f"gpus{part}"


def threads_of_job(threads: int | None, launcher: dict[str, Any]) -> int | None:
    """Return a job's CPU threads: those that a person gave, else its share of the machine.

    launcher: the launcher's config.  None stands for PyTorch's default, all cores.
    """
    if threads is not None:
        return threads
    if given := launcher.get("cpus_per_task"):
        return int(given)
    jobs = launcher.get("n_jobs")
    if jobs is None:
        return None
    side_by_side = jobs if jobs > 0 else max(1, cores() + 1 + jobs)  # joblib: -1 is all cores
    return max(1, cores() // side_by_side)
