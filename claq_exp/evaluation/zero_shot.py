"""Zero-shot scores through lm-eval, with the stock task on local rows or on the hub's."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from claq_exp.errors import SourceError, telling_line
from claq_exp.evaluation.lending import lent, seed_like_lm_eval, unchanged_process
from claq_exp.evaluation.tasks import (
    load_task,
    metric_key,
    request_count,
    right_answer,
    unanswered,
)

if TYPE_CHECKING:
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
    requests: how often the model was asked.  cut_requests: of them, those whose prompt was longer
    than the context allows, and lost `cut_tokens` in all from the beginning.  without_score: those
    with an answer that is no number.  unanswered_rows: rows whose right answer is none of their
    choices.
    """

    metric: str
    value: float
    stderr: float | None
    rows: int
    shots: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    requests_sha256: str = ""
    requests: int = 0
    cut_requests: int = 0
    cut_tokens: int = 0
    without_score: int = 0
    unanswered_rows: int = 0


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
    with unchanged_process(), lent(model):
        loaded = load_task(name, task)
        import lm_eval

        from claq_exp.evaluation.adapter import Adapter, Answers
        from claq_exp.models.dispatch import input_device

        device = input_device(model)
        if batch_size == "auto" and device.type == "cpu":
            kinds = {leaf.OUTPUT_TYPE for leaf in loaded["tasks"].values()}
            batch_size = 1 if WHOLE_CONTEXT in kinds else CPU_REQUESTS
        answers = Answers(loaded["tasks"].values(), on_share)
        os.environ["DISABLE_MULTIPROC"] = "1"  # a fork of a process with threads can hang
        seed_like_lm_eval()
        try:
            adapter = Adapter(model, tokenizer, batch_size, device)
            adapter.set_cache_hook(answers)
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
            raise SourceError(
                f"lm-eval could not run the {where}: {telling_line(error)}"
            ) from error
    on_share(1.0)
    assert results is not None
    return replace(
        _task_score(name, task, loaded, results),
        cut_requests=adapter.cut_requests,
        cut_tokens=adapter.cut_tokens,
        without_score=answers.without_score,
    )


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
        requests=request_count(loaded["tasks"].values()),
        unanswered_rows=sum(len(unanswered(leaf)) for leaf in loaded["tasks"].values()),
    )


def _requests_content(leaves: Iterable[Task]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        for instance in leaf.instances:
            asked = [instance.request_type, *instance.args, right_answer(leaf, instance.doc)]
            digest.update(json.dumps(asked, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
