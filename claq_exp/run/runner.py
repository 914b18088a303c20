"""One experiment from config to results."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claq_exp import __version__
from claq_exp.config import ExperimentConfig
from claq_exp.evaluation.caveats import tell_caveats
from claq_exp.models.ends import ADVICE, KEPT, EndsError
from claq_exp.models.load import forward_dtype, look_at
from claq_exp.quantize.stale_kernels import drop_stale_kernels
from claq_exp.run.ends import required_ends
from claq_exp.run.inputs import fetch, tokenize_inputs
from claq_exp.run.job import Job
from claq_exp.run.needs import check_needs
from claq_exp.run.plan import make_plan
from claq_exp.run_folder import (
    EVENTS_FILE,
    RunFolder,
    run_identity,
)
from claq_exp.run_folder.fallbacks import ENDS
from claq_exp.sources.cache import fetch_log
from claq_exp.system.distributed import ALONE, Ranks
from claq_exp.system.interruption import graceful
from claq_exp.system.machine import choose_device, settle
from claq_exp.tracking.events import EventLog
from claq_exp.tracking.progress import RunProgress, noise_to
from claq_exp.tracking.wandb import WandbTracker


@dataclass(frozen=True)
class Outcome:
    """What a run left behind; `found` tells a run that was already finished."""

    folder: Path
    results: dict[str, Any]
    found: bool
    notes: tuple[str, ...] = ()


def run(
    config: ExperimentConfig,
    command: str,
    say: Callable[[str], None] = lambda _: None,
    *,
    progress: Callable[[dict[str, float]], RunProgress] = RunProgress,
    wait: bool = False,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run an experiment, or continue it, or find it finished.

    command: what a person typed, for the record.  say: shows a line while no progress bar is up,
    on a stream of its own: standard error goes to a log now and then.
    progress: makes the progress bar from estimates.  wait: for another process that has the same
    run, where this would raise else.  ranks: of which this is the first, and the others `assist`.
    """
    device = choose_device(config.device)
    drop_stale_kernels()
    settle(config.seed, config.threads)
    with noise_to(fetch_log()):
        fetched = fetch(config, say=say)
    remote = config.model.trust_remote_code
    original = look_at(fetched.model, trust_remote_code=remote, strict=config.strict)
    config = config.with_dtype(forward_dtype(config.model.dtype, original.config, device))
    identity = run_identity(config, fetched.contents, __version__)
    folder = RunFolder.of(config, identity)
    finished = folder.results()
    if finished is not None and config.resume != "never":
        _check_kept_ends(config, finished)
        return Outcome(folder.path, finished, found=True)
    plan = make_plan(config, original.config, device)
    if config.check_resources:
        check_needs(plan.needs, device, folder.path.parent)
    with noise_to(fetch_log()):
        tokens = tokenize_inputs(config, fetched.model, fetched.contents)
    with folder.locked(wait=wait):
        finished = folder.results()  # another process may have been first
        if finished is not None and config.resume != "never":
            return Outcome(folder.path, finished, found=True)
        with folder.recorded():
            folder.prepare(config.resume, identity)
            bits = f"{plan.sizes.nominal:.2f} nominal / {plan.sizes.linear:.2f} linear bits planned"
            say(f"{bits}; {folder.path}")
            folder.write_settings(command, identity)
            tracker = _tracker(config, folder, say)
            with (
                graceful() as interruption,
                progress(plan.seconds) as bar,
                noise_to(folder.path / "third_party.log"),
                EventLog(folder.path / EVENTS_FILE, [tracker] if tracker else []) as events,
            ):
                inputs = (fetched, original, tokens)
                job = Job(config, folder, *inputs, plan, device, bar, events, ranks, interruption)
                results = job.results(command)
                tell_caveats(results, events.event, strict=config.strict)
                events.results(results)
                events.event("finished", seconds=results["run"]["seconds"])
            folder.write_results(results)
        shutil.rmtree(folder.work, ignore_errors=True)
        notes = [tracker.failure] if tracker and tracker.failure else []
        return Outcome(folder.path, results, found=False, notes=(*notes, *job.notes))


def _check_kept_ends(config: ExperimentConfig, results: dict[str, Any]) -> None:
    """Raise EndsError where a finished run has kept in 16 bits what must be packed now."""
    kept = results.get("fallbacks", {}).get(ENDS)
    if kept and required_ends(*config.end_rules()):
        raise EndsError(f"{kept.removesuffix(KEPT)}{ADVICE}")


def _tracker(
    config: ExperimentConfig, folder: RunFolder, say: Callable[[str], None]
) -> WandbTracker | None:
    if config.tracking.name == "none":
        return None
    tracker = WandbTracker(config.tracking, folder.path, folder.path.name, config.as_dict())
    if tracker.failure:
        say(tracker.failure)
    return tracker
