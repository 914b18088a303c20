"""What a launcher calls for each job of a sweep, in whatever process and on whatever machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from claq_exp.compose.experiment import experiment_part
from claq_exp.config import ExperimentConfig, config_from_omegaconf
from claq_exp.run_folder import RUNNING, RunState, this_process
from claq_exp.run_folder.jobs import Job, JobInterruptedError, JobRecord, recorded_job
from claq_exp.sweep.apart import run_apart
from claq_exp.sweep.share import one_gpu, threads_of_job
from claq_exp.sweep.work import WORST, Done, OnShare, Order
from claq_exp.tracking.limits import NAME

RunJob = Callable[[Order, OnShare, Callable[[], None]], Done]


@dataclass(frozen=True)
class Sweep:
    """What all jobs of a sweep know.

    command: what a person typed.  folder: of this one call, for the records of its jobs and a file
    that stops them.  run_job: how a job is run; by default in a process of its own.  seeds: every
    recipe is run with several seeds.  process: where the sweep itself runs.
    """

    command: str
    folder: Path
    run_job: RunJob = run_apart
    seeds: bool = False
    process: str = field(default_factory=this_process)

    @property
    def stop_file(self) -> Path:
        """Tells jobs on any machine to end."""
        return self.folder / "stop"

    def check(self) -> None:
        """Raise JobInterruptedError when the sweep was stopped."""
        if self.stop_file.exists():
            raise JobInterruptedError("the sweep was stopped")


def run_sweep_job(sweep: Sweep, composed: DictConfig) -> float:
    """Run one job and return its objective, or `WORST` where it failed: the record says why.

    A job that was asked to end has failed too, and one that had not begun leaves no record: to
    raise would make launchers kill the jobs that are still finishing their work.
    """
    if sweep.process != this_process() and current_thread() is main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's reaches the sweep, which asks
    hydra = HydraConfig.get()
    number, overrides = hydra.job.num, tuple(map(_as_typed, hydra.overrides.task))
    launcher = OmegaConf.to_container(hydra.launcher)
    assert isinstance(launcher, dict)
    results = Path(composed.outputs).expanduser() / composed.name
    job = Job(number, overrides, RunState(RUNNING), results=str(results), seeds=sweep.seeds)
    try:
        sweep.check()
        with (
            one_gpu(composed.device, launcher.get("_target_", ""), sweep.check) as environment,
            recorded_job((results, sweep.folder), job, sweep.check) as record,
        ):
            return _run(sweep, composed, launcher, environment, record, number)
    except Exception:  # noqa: BLE001 - it is on record, and must stop neither sweeper nor launcher
        return WORST


def _as_typed(override: str) -> str:
    """Return an override as a person writes it: Hydra's sweeper gives a deletion a value."""
    return override.removesuffix("=null") if override.startswith("~") else override


def _run(
    sweep: Sweep,
    composed: DictConfig,
    launcher: dict[Any, Any],
    environment: dict[str, str],
    record: JobRecord,
    number: int,
) -> float:
    config = in_a_sweep(config_from_omegaconf(experiment_part(composed)), launcher)
    log = sweep.folder / f"{number}.log"
    order = Order(config, sweep.command, {**os.environ, **environment}, log)
    done = sweep.run_job(order, record.progress, sweep.check)
    record.finish(folder=done.folder, found=done.found, objective=done.objective, notes=done.notes)
    return WORST if done.objective is None else done.objective


def in_a_sweep(config: ExperimentConfig, launcher: dict[Any, Any]) -> ExperimentConfig:
    """Fill in what a job of a sweep has where a person gave nothing: W&B's group, threads."""
    group = config.name[:NAME] if config.tracking.group is None else config.tracking.group
    return replace(
        config,
        tracking=replace(config.tracking, group=group),
        threads=threads_of_job(config.threads, launcher),
    )
