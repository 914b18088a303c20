"""lm-eval's adapter of a model, which counts what it cuts off and what has no score."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from claq_exp.errors import SourceError
from claq_exp.evaluation.tasks import request_count

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, their tokens


class Adapter(HFLM):
    """A model for lm-eval, with a tokenizer of its own: lm-eval adds tokens to it.

    cut_requests: prompts that were longer than the model's context allows, and lost `cut_tokens`
    from their beginning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str,
        device: torch.device,
    ) -> None:
        """Take a model; device: where it takes its token ids."""
        super().__init__(
            pretrained=model,
            backend="causal",  # its guess takes models for sound, which read text here, for seq2seq
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
        )
        self._device = device
        self.cut_requests = self.cut_tokens = 0
        self._asked: list[Instance] = []

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score answers; what is asked is kept to name the row of an answer that cannot be."""
        self._asked = requests
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Count prompts that are cut.  Raises SourceError for an answer that lm-eval cannot score.

        The windows of a rolling log-likelihood come without a text, and are never cut.
        """
        for number, (texts, prompt, answer) in enumerate(requests):
            if texts is not None:
                self._check_answer(number, len(answer))
                self._count(len(prompt) + len(answer), self.max_length + 1)
        return super()._loglikelihood_tokens(
            requests, disable_tqdm=disable_tqdm, override_bs=override_bs
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers.  Raises SourceError for a tokenizer without a token to end them."""
        if self.eot_token_id is None:
            raise SourceError("the tokenizer has no eos_token, at which a generated answer ends")
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the prompts of a generation that are cut to leave room for what is generated."""
        if left_truncate_len:
            _, mask = super().tok_batch_encode(strings, padding_side)
            for tokens in mask.sum(1).tolist():
                self._count(tokens, left_truncate_len)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)

    def _count(self, tokens: int, most: int) -> None:
        if tokens > most:
            self.cut_requests += 1
            self.cut_tokens += tokens - most

    def _check_answer(self, number: int, tokens: int) -> None:
        if 0 < tokens <= self.max_length:
            return
        asked = self._asked[number]
        what = (
            f"of {tokens} tokens, more than the model's context of {self.max_length}"
            if tokens
            else "without a token of its own"
        )
        raise SourceError(f"row {asked.doc_id + 1} of {asked.task_name} has an answer {what}")


class Answers:
    """Told by lm-eval of every answer, in the place of a cache of answers.

    without_score: answers whose log-likelihood is no number.
    """

    dbdict = None

    def __init__(self, leaves: Iterable[Task], on_share: Callable[[float], None]) -> None:
        """Follow tasks.  on_share: called with the share that is answered."""
        self._leaves, self._on_share = list(leaves), on_share
        self._done = self._wanted = 0
        self.without_score = 0

    def add_partial(self, _kind: str, _request: Any, answer: Any) -> None:
        """Count an answer: a text, a log-likelihood, or a log-likelihood and what else is known."""
        if not self._wanted:  # the requests are there when the first answer is
            self._wanted = request_count(self._leaves)
        self._done += 1
        value = answer[0] if isinstance(answer, tuple) else answer
        self.without_score += isinstance(value, float) and math.isnan(value)
        self._on_share(min(1.0, self._done / self._wanted))
