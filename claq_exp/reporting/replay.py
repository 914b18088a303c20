"""Rebuilds the Weights & Biases run of an experiment from what its folder holds."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from claq_exp.errors import ClaqError, ConfigError
from claq_exp.run_folder import (
    EVENTS_FILE,
    FINISHED,
    RESULTS_FILE,
    RUNNING,
    run_state,
    settings_file,
)
from claq_exp.system.files import read_json
from claq_exp.tracking.events import read_events
from claq_exp.tracking.limits import TrackingConfig
from claq_exp.tracking.wandb import WandbTracker, check_wandb


def replay(folder: Path, *, project: str | None = None, mode: str = "offline") -> None:
    """Log a run's events and results as the live tracker would have, in the run's own folder.

    What the tracker makes of an event is its own business: live and here it is the same code.  A
    run that was continued becomes one W&B run.  project: in place of the config's own.
    Raises ConfigError for a folder without a run or with a running one, ClaqError when W&B fails.
    """
    check_wandb()
    state = run_state(folder)
    if state is None or not (folder / EVENTS_FILE).is_file():
        raise ConfigError(f"report: '{folder}' is no run folder, there is no {EVENTS_FILE} in it")
    if state.name == RUNNING:
        raise ConfigError(f"report: the run in {folder} is going on; replay it when it has ended")
    results = read_json(folder / RESULTS_FILE) if state.name == FINISHED else None
    config = results["config"] if results else read_json(settings_file(folder))["config"]
    tracking = _tracking(config.get("tracking", {}), mode)
    if project:
        tracking = replace(tracking, project=project)
    tracker = WandbTracker(tracking, folder, folder.resolve().name, config)
    for event, data in read_events(folder / EVENTS_FILE):
        tracker.event(event, data)
    tracker.finish(results)
    if tracker.failure:
        raise ClaqError(f"report: {folder}: {tracker.failure}")


def _tracking(values: dict[str, Any], mode: str) -> TrackingConfig:
    known = {field.name for field in fields(TrackingConfig)}
    kept = {key: value for key, value in values.items() if key in known}
    return TrackingConfig(**{**kept, "name": "wandb", "mode": mode})
