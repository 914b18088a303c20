"""Measures a model on everything an evaluation asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from claq_exp.evaluation.caveats import refuse_score
from claq_exp.evaluation.perplexity import Corpus, Perplexity, perplexity, windows_at_once
from claq_exp.evaluation.predict import Subject
from claq_exp.evaluation.scores import ScoreStore
from claq_exp.evaluation.zero_shot import TaskScore, score_tasks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from claq_exp.config import EvaluationConfig

TASK_SHARE = 0.5  # of a measurement's progress, where there are tasks as well as corpora


@dataclass
class Measurement:
    """Perplexity by corpus, task score by task."""

    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    zero_shot: dict[str, TaskScore] = field(default_factory=dict)


@dataclass(frozen=True)
class Meter:
    """Measures one model; what was measured of it before is taken from a store.

    vocabulary: logits of a token.  task_contents: task -> hash of all that defines its score.
    logit_windows: corpus -> how many of its first windows must run through the model for their
    logits, known score or not.
    strict: refuse a task whose score has a caveat, before the next one is measured.
    on_value: called with (perplexity or zero_shot, name, value).  on_share: called with (share of
    the work, what).  on_logits: called with (corpus, number of the window, logits [seqlen - 1,
    vocabulary]).
    """

    subject: Subject
    vocabulary: int
    tokenizer: PreTrainedTokenizerBase
    device: str
    store: ScoreStore
    task_contents: Mapping[str, str]
    logit_windows: Mapping[str, int] = field(default_factory=dict)
    strict: bool = False
    on_value: Callable[[str, str, float], None] = lambda _kind, _name, _value: None
    on_share: Callable[[float, str], None] = lambda _share, _detail: None
    on_logits: Callable[[str, int, Tensor], None] = lambda _corpus, _window, _logits: None

    def measure(self, corpora: Mapping[str, Corpus], evaluation: EvaluationConfig) -> Measurement:
        """Measure perplexity on each corpus, and the tasks; each score is kept as it comes."""
        result = Measurement()
        windows = sum(len(corpus.windows) for corpus in corpora.values())
        share = 1.0 if not evaluation.zero_shot else 1.0 - TASK_SHARE
        for name, corpus in corpora.items():
            score = self._perplexity(name, corpus, evaluation, share / windows)
            result.perplexity[name] = score
            self.on_value("perplexity", name, score.value)
        for name in evaluation.zero_shot:
            self.on_share(0.0, name)
            task = self._task(name, evaluation)
            if self.strict:
                refuse_score(name, task)
            result.zero_shot[name] = task
            self.on_value("zero_shot", name, task.value)
        return result

    def _perplexity(
        self, name: str, corpus: Corpus, evaluation: EvaluationConfig, share: float
    ) -> Perplexity:
        seqlen = corpus.windows.shape[1]
        batch_size = windows_at_once(evaluation.batch_size, seqlen, self.vocabulary, self.device)
        measure = {"perplexity": corpus.content(), "seqlen": seqlen, "batch_size": batch_size}
        known = self.store.find(measure)
        run = corpus.windows
        if known is not None:
            run = run[: self.logit_windows.get(name, 0)]
            self.on_share(share * (len(corpus.windows) - len(run)), name)
        if len(run):
            found = perplexity(
                self.subject.predict,
                replace(corpus, windows=run),
                batch_size,
                lambda done: self.on_share(share * done, name),
                partial(self.on_logits, name),
            )
        if known is None:
            self.store.keep(measure, _plain(asdict(found)))
            return found
        windows = tuple(map(_number, known["window_nll"]))
        return Perplexity(**{**_measured(known), "window_nll": windows})

    def _task(self, name: str, evaluation: EvaluationConfig) -> TaskScore:
        task, batch_size = evaluation.zero_shot[name], evaluation.batch_size
        measure = {"task": name, "content": self.task_contents[name], "batch_size": batch_size}
        share, done = TASK_SHARE / len(evaluation.zero_shot), 0.0

        def advance(reached: float) -> None:
            nonlocal done
            self.on_share(share * (reached - done), name)
            done = reached

        known = self.store.find(measure)
        if known is not None:
            advance(1.0)
            return TaskScore(**_measured(known))
        found = score_tasks(
            self.subject.model(), self.tokenizer, {name: task}, batch_size, advance
        )[name]
        self.store.keep(measure, _plain(asdict(found)))
        return found


def _plain(value: Any) -> Any:
    """Return JSON data: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measured(score: dict[str, Any]) -> dict[str, Any]:
    """Read `_plain` back; a value of null is infinite."""
    return {**score, "value": _number(score["value"])}


def _number(value: float | None) -> float:
    return math.inf if value is None else value
