"""Zero-shot scores through lm-eval, with the stock task on local rows or on the hub's."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from claq_exp.errors import SourceError, first_line
from claq_exp.evaluation.tasks import load_task, metric_key, right_answer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from claq_exp.config import TaskConfig

ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
CPU_REQUESTS = 8  # as fast as 16 and 32 on two cores, and their logits take half the memory
WHOLE_CONTEXT = "loglikelihood_rolling"  # requests as long as the model's context
BOOTSTRAPS = 1000  # resamples for a standard error that has no formula


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task over `rows` rows, and all that it has; accuracies are in [0, 1].

    stderr: standard error of the value (None: the metric has none).  shots: examples in the prompt.
    requests_sha256: of every prompt, continuation and right answer in order, to compare like with
    like.
    """

    metric: str
    value: float
    stderr: float | None
    rows: int
    shots: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    requests_sha256: str = ""


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskConfig],
    batch_size: int | str,
    on_share: Callable[[float], None] = lambda _: None,
) -> dict[str, TaskScore]:
    """Score a model on tasks; the prompt, choices and metrics are the stock task's.

    batch_size: requests at a time, or `auto`.  on_share: called with the share of all tasks that is
    done.  Raises SourceError when a task's data cannot be had, ConfigError for a metric that the
    task does not have.
    """
    scores = {}
    for number, (name, task) in enumerate(tasks.items()):

        def share(done: float, number: int = number) -> None:
            on_share((number + done) / len(tasks))

        scores[name] = _score(model, tokenizer, name, task, batch_size, share)
    return scores


def is_accuracy(metric: str) -> bool:
    """Tell the metrics that are shares of right answers."""
    return metric.partition(",")[0] in ACCURACIES


def average_accuracy(scores: Mapping[str, TaskScore]) -> float | None:
    """Return the mean over the tasks whose metric is an accuracy; None for fewer than two."""
    values = [score.value for score in scores.values() if is_accuracy(score.metric)]
    return math.fsum(values) / len(values) if len(values) > 1 else None


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    task: TaskConfig,
    batch_size: int | str,
    on_share: Callable[[float], None],
) -> TaskScore:
    loaded = load_task(name, task)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from claq_exp.models.dispatch import input_device

    device = input_device(model)
    if batch_size == "auto" and device.type == "cpu":
        kinds = {leaf.OUTPUT_TYPE for leaf in loaded["tasks"].values()}
        batch_size = 1 if WHOLE_CONTEXT in kinds else CPU_REQUESTS
    adapter = HFLM(
        pretrained=model,
        backend="causal",  # its guess takes models for sound, which read text here, for seq2seq
        tokenizer=tokenizer,
        batch_size=batch_size,
    )
    adapter._device = device  # where it sends token ids
    adapter.set_cache_hook(_Progress(loaded["tasks"].values(), on_share))
    try:
        with _one_process():
            results = lm_eval.evaluate(
                adapter,
                loaded,
                limit=task.rows,
                cache_requests=False,  # lm-eval's key for it knows neither rows nor definition
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
    except Exception as error:
        where = f"task '{name}' on {task.data or 'the rows of the hub'}"
        raise SourceError(f"lm-eval could not run the {where}: {first_line(error)}") from error
    on_share(1.0)
    assert results is not None
    return _task_score(name, task, loaded, results)


def _task_score(
    name: str, task: TaskConfig, loaded: TaskDict, results: Mapping[str, Any]
) -> TaskScore:
    values = {
        key: float(value)
        for key, value in results["results"][name].items()
        if "," in key and isinstance(value, (int, float))
    }
    metrics = {
        key: value for key, value in values.items() if "_stderr" not in key.partition(",")[0]
    }
    key = metric_key(name, task.metric, metrics)
    metric, _, filter_ = key.partition(",")
    return TaskScore(
        metric=task.metric,
        value=metrics[key],
        stderr=values.get(f"{metric}_stderr,{filter_}"),
        rows=sum(results["n-samples"][leaf]["effective"] for leaf in loaded["tasks"]),
        shots=task.shots,
        metrics={key.removesuffix(",none"): value for key, value in metrics.items()},
        requests_sha256=_requests_content(loaded["tasks"].values()),
    )


def _requests_content(leaves: Iterable[Task]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        for instance in leaf.instances:
            asked = [instance.request_type, *instance.args, right_answer(leaf, instance.doc)]
            digest.update(json.dumps(asked, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


class _Progress:
    """Told by lm-eval of every answer, in the place of a cache of answers."""

    dbdict = None

    def __init__(self, leaves: Iterable[Task], on_share: Callable[[float], None]) -> None:
        self._leaves, self._on_share = list(leaves), on_share
        self._done = self._wanted = 0

    def add_partial(self, _kind: str, _request: Any, _answer: Any) -> None:
        """Count an answer."""
        if not self._wanted:  # the requests are there when the first answer is
            instances = (leaf.instances for leaf in self._leaves)
            self._wanted = sum(len(some or ()) for some in instances)
        self._done += 1
        self._on_share(min(1.0, self._done / self._wanted))


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm-eval from forking for a standard error: a fork of a process with threads can hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
