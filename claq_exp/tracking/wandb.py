"""Weights & Biases as a mirror: it may be absent or fail without harm to the run."""

from __future__ import annotations

import copy
import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claq_exp.errors import ConfigError, telling_line

if TYPE_CHECKING:
    from claq_exp.tracking.limits import TrackingConfig

LIMITS: dict[str, Any] = {  # seconds that W&B may take, where its release knows the setting
    "init_timeout": 30.0,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
}
FINISH_SECONDS = 90.0  # after which W&B is left alone, whatever it does


def check_wandb() -> None:
    """Raise ConfigError when wandb is not installed, for a command that is about nothing else."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "tracking=wandb needs the package wandb; pip install wandb, or use tracking=none"
        )


class WandbTracker:
    """One W&B run per experiment: config, a step per layer, the results as summary and table.

    After the first failure of W&B, be it that it is not installed, the rest is skipped, and
    `failure` says why.
    """

    def __init__(
        self, tracking: TrackingConfig, folder: Path, name: str, config: dict[str, Any]
    ) -> None:
        self.failure: str | None = None
        self._run: Any = None
        self._guard(self._start, tracking, folder, name, config)

    def event(self, name: str, data: dict[str, Any]) -> None:
        """Mirror a layer as one step, other events as flat metrics."""
        if name == "layer":
            metrics = {f"layer/{key}": data[key] for key in ("bits", "output_error", "seconds")}
            self._guard(lambda: self._run.log({**metrics, "layer/name": data["name"]}))
        elif name in ("perplexity", "zero_shot", "kl"):
            key = f"{name}/{data['dataset']}/{data['model']}"
            self._guard(lambda: self._run.log({key: data["value"]}))

    def finish(self, results: dict[str, Any] | None) -> None:
        """Write summary and table, and close the run whatever happened before."""
        if results is not None:
            self._guard(self._summarize, results)
        if self._run is not None:
            failure, self.failure = self.failure, None  # one that broke down is closed all the same
            self._guard(self._close, 0 if results is not None else 1)
            self.failure = failure or self.failure

    def _start(
        self, tracking: TrackingConfig, folder: Path, name: str, config: dict[str, Any]
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run = wandb.init(
            project=tracking.project,
            name=name,
            group=tracking.group,
            tags=list(tracking.tags),
            mode=tracking.mode,  # type: ignore[arg-type]
            dir=folder,
            config=copy.deepcopy(config),
            job_type="quantize",
            settings=limits(),
        )

    def _close(self, exit_code: int) -> None:
        within(FINISH_SECONDS, lambda: self._run.finish(exit_code=exit_code))

    def _summarize(self, results: dict[str, Any]) -> None:
        import wandb

        rows: list[Any] = [[*row.values()] for row in comparison_rows(results)]
        table = wandb.Table(columns=["measure", "original", "quantized"], data=rows)
        self._run.log({"comparison": table})
        kept = {key: results[key] for key in ("bits", "size", "kl", "timings")}
        self._run.summary.update(copy.deepcopy(kept))  # results.json is written after this

    def _guard(self, call: Any, *args: Any) -> None:
        if self.failure is not None:
            return
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001 - a mirror must not end the run
            self.failure = f"Weights & Biases failed and was left out: {telling_line(error)}"


def limits() -> Any:
    """Return W&B's settings that keep it from waiting without end."""
    import wandb

    known = wandb.Settings.model_fields
    return wandb.Settings(**{name: value for name, value in LIMITS.items() if name in known})


def within(seconds: float, call: Callable[[], object]) -> None:
    """Call in a thread of its own.  Raises TimeoutError after `seconds`, else what it raises."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)  # must not keep the process alive
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"it was not done after {seconds:g} s")
    if errors:
        raise errors[0]


def comparison_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows {measure, original, quantized} of everything that was measured on both models."""
    rows = [
        {
            "measure": f"perplexity {name}",
            "original": row["original"],
            "quantized": row["quantized"],
        }
        for name, row in results["perplexity"].items()
    ]
    rows += [
        {
            "measure": f"{name} {row['metric']}",
            "original": row["original"],
            "quantized": row["quantized"],
        }
        for name, row in results["zero_shot"].items()
    ]
    if average := results.get("average_accuracy"):
        rows.append({"measure": "average accuracy", **average})
    return rows
