"""Perplexity on non-overlapping windows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) per predicted token.

    tokens: predicted tokens, seqlen - 1 a window.  tokens_sha256: of all window tokens, to compare
    like with like.
    """

    value: float
    seqlen: int
    tokens: int
    tokens_sha256: str


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    windows: Tensor,
    batch_size: int,
    device: str,
    tick: Callable[[int], None] = lambda _: None,
    on_logits: Callable[[int, Tensor], None] = lambda _window, _logits: None,
) -> Perplexity:
    """Measure a causal language model on windows [n, seqlen] int64.

    The convention of GPTQ's evaluation: every window is seen alone, its first token is context, the
    mean runs over all predicted tokens.  tick: called with the number of windows done.
    on_logits: called with each window's number and its logits [seqlen - 1, vocabulary].
    """
    total = 0.0
    window = 0
    for batch in windows.split(batch_size):
        tokens = batch.to(device)
        logits = model(tokens, use_cache=False).logits
        for row, target in zip(
            logits, tokens, strict=True
        ):  # one window's float32 logits at a time
            loss = nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum")
            total += loss.item()
            on_logits(window, row[:-1])
            window += 1
        tick(len(batch))
    predicted = windows.numel() - len(windows)
    mean = total / predicted
    return Perplexity(
        value=math.inf if mean > 700 else math.exp(mean),  # NaN stays NaN
        seqlen=windows.shape[1],
        tokens=predicted,
        tokens_sha256=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    )
