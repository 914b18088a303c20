"""Measures a model on everything an evaluation asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from claq_exp.config import EvaluationConfig
from claq_exp.evaluation.perplexity import Perplexity, perplexity
from claq_exp.evaluation.zero_shot import TaskScore, score_tasks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK_SHARE = 0.5  # of a measurement's progress, where there are tasks as well as corpora


@dataclass
class Measurement:
    """Perplexity by corpus, task score by task."""

    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    zero_shot: dict[str, TaskScore] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; a perplexity that is not finite becomes null."""
        data = asdict(self)
        for row in data["perplexity"].values():
            row["value"] = row["value"] if math.isfinite(row["value"]) else None
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Measurement:
        """Read `to_json` back; null becomes infinity."""
        return Measurement(
            {
                name: Perplexity(
                    **{**row, "value": math.inf if row["value"] is None else row["value"]}
                )
                for name, row in data["perplexity"].items()
            },
            {name: TaskScore(**row) for name, row in data["zero_shot"].items()},
        )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpora: dict[str, Tensor],
    evaluation: EvaluationConfig,
    device: str,
    *,
    on_value: Callable[[str, str, float], None] = lambda _kind, _name, _value: None,
    on_share: Callable[[float, str], None] = lambda _share, _detail: None,
    on_logits: Callable[[str, int, Tensor], None] = lambda _corpus, _window, _logits: None,
) -> Measurement:
    """Measure perplexity on each corpus (name -> windows [n, seqlen] int64) and the tasks.

    on_value: called with (perplexity or zero_shot, name, value).  on_share: called with (share of
    the work, what).  on_logits: called with (corpus, number of the window, logits [seqlen - 1,
    vocabulary]).
    """
    result = Measurement()
    windows = sum(len(corpus) for corpus in corpora.values())
    share = 1.0 if not evaluation.zero_shot else 1.0 - TASK_SHARE
    for name, corpus in corpora.items():
        result.perplexity[name] = perplexity(
            model,
            corpus,
            evaluation.batch_size,
            device,
            lambda done, name=name: on_share(share * done / windows, name),  # type: ignore[misc]
            partial(on_logits, name),
        )
        on_value("perplexity", name, result.perplexity[name].value)
    for name, task in evaluation.zero_shot.items():
        on_share(0.0, name)
        result.zero_shot |= score_tasks(model, tokenizer, {name: task}, evaluation.batch_size)
        on_share(TASK_SHARE / len(evaluation.zero_shot), name)
        on_value("zero_shot", name, result.zero_shot[name].value)
    return result
