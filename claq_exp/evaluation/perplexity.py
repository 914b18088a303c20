"""Perplexity by the convention of the GPTQ line of papers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from claq_exp.evaluation.predict import Predictor
from claq_exp.sources.content import Losses
from claq_exp.system import accelerator

CPU_TOKENS = 2048  # at a time: more gain nothing on a CPU, and their logits take memory
GPU_TOKENS = 16384
PIECE = 256  # tokens whose losses are taken at a time
LOGIT_SHARE = 0.2  # of a GPU's memory that the logits of a batch may take, with their float32 copy


@dataclass(frozen=True)
class Corpus:
    """A corpus for perplexity: windows [n, seqlen] int64, and which rule put their first tokens.

    overlap: share of its tokens in passages that the calibration windows hold too (None: nothing
    to compare with).  losses: what of its text was not read.
    """

    windows: Tensor
    bos: str
    overlap: float | None = None
    losses: Losses = field(default_factory=Losses)

    def content(self) -> str:
        """Return the hash that identifies the tokens in results."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()

    def window_contents(self) -> list[str]:
        """Return the hash of each window's tokens."""
        return [hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in self.windows]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood in nats over `tokens` predicted tokens.

    seqlen: of a window, whose first token is context only.  tokens_sha256: of all windows, to
    compare like with like.  window_nll: the sum of a window's log-likelihoods, for each window:
    `value` is exp of their sum (`math.fsum`) over `tokens`.
    """

    value: float
    seqlen: int
    tokens: int
    tokens_sha256: str
    window_nll: tuple[float, ...] = ()


@torch.inference_mode()
def perplexity(
    predict: Predictor,
    corpus: Corpus,
    batch_size: int,
    tick: Callable[[float], None] = lambda _: None,
    on_logits: Callable[[int, Tensor], None] = lambda _window, _logits: None,
) -> Perplexity:
    """Measure a causal language model on the windows of a corpus.

    The convention of GPTQ's evaluation: every window is seen alone, its first token is context, the
    mean runs over all predicted tokens.  tick: called with windows done, also parts of one.
    on_logits: called with each window's number and its logits [seqlen - 1, vocabulary].
    """
    window_nll: list[float] = []
    window = 0
    windows = corpus.windows
    batches = list(windows.split(batch_size))
    predicted_logits = predict(batches, tick)
    for tokens in batches:
        logits = next(predicted_logits)
        losses = []
        for row, target in zip(logits, tokens.to(logits.device), strict=True):
            losses.append(_loss(row[:-1], target[1:]))
            on_logits(window, row[:-1])
            window += 1
        window_nll += torch.stack(losses).tolist()  # the device is waited for once a batch
        del logits, row  # before the next batch makes its own
    next(predicted_logits, None)  # so that it ticks for the last one too
    predicted = windows.numel() - len(windows)
    mean = math.fsum(window_nll) / predicted
    return Perplexity(
        value=math.inf if mean > 700 else math.exp(mean),  # NaN stays NaN
        seqlen=windows.shape[1],
        tokens=predicted,
        tokens_sha256=corpus.content(),
        window_nll=tuple(window_nll),
    )


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sum of -log p(target) of a window, a float64 scalar.

    Some tokens at a time: their float32 logits stay in cache.
    """
    pieces = zip(logits.split(PIECE), target.split(PIECE), strict=True)
    losses = [
        nn.functional.cross_entropy(piece.float(), wanted, reduction="sum")
        for piece, wanted in pieces
    ]
    return torch.stack(losses).double().sum()


def windows_at_once(wanted: int | str, seqlen: int, vocabulary: int, device: str) -> int:
    """Return the batch size for windows of `seqlen` tokens; `auto` depends on the device alone."""
    if isinstance(wanted, int):
        return wanted
    if accelerator.is_cpu(device):
        return max(1, CPU_TOKENS // seqlen)
    _, memory = accelerator.free_and_total(device)
    fitting = int(LOGIT_SHARE * memory / (vocabulary * 8))  # tokens: two copies in 32 bits
    return max(1, min(GPU_TOKENS, fitting) // seqlen)
