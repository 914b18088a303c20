"""Token windows of equal length, by the conventions that are in use."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from claq_exp.errors import ConfigError

Encode = Callable[[str], Tensor]  # text -> [n] int64


@dataclass(frozen=True)
class Draw:
    """Which windows of a text are taken.

    windows: how many (None: all, where the draw knows what that is).  seqlen: tokens of each.
    seed: of the random draws.  where: the config group that a message should name.
    """

    windows: int | None
    seqlen: int
    seed: int
    where: str

    def refuse(self, found: str, advice: str) -> ConfigError:
        """Return the error for a text that does not give the windows."""
        return ConfigError(
            f"{self.where}: the text has {found}, and "
            f"{self.windows or 1} are asked for; {advice}, or give a longer text"
        )


def first(documents: Sequence[str], join: str, encode: Encode, draw: Draw) -> Tensor:
    """Take non-overlapping windows from the start of the joined text; the rest is dropped.

    The convention for perplexity of GPTQ (arXiv 2210.17323) and of nearly all papers after it.
    """
    return _cut(encode(join.join(documents)), draw)[: draw.windows]


def shuffled(documents: Sequence[str], join: str, encode: Encode, draw: Draw) -> Tensor:
    """Take distinct non-overlapping windows of the joined text in a random order."""
    candidates = _cut(encode(join.join(documents)), draw)
    generator = torch.Generator().manual_seed(draw.seed)
    order = torch.randperm(len(candidates), generator=generator)
    return candidates[order[: draw.windows]]


def positions(documents: Sequence[str], join: str, encode: Encode, draw: Draw) -> Tensor:
    """Take windows that start anywhere in the joined text; they may overlap.

    GPTQ's calibration on WikiText-2 and PTB: `random.seed(seed)`, then one
    `randint(0, tokens - seqlen - 1)` a window.
    """
    tokens = encode(join.join(documents))
    if len(tokens) <= draw.seqlen:
        raise draw.refuse(f"{len(tokens)} tokens, i.e. no window of {draw.seqlen}", _shorter(draw))
    generator = random.Random(draw.seed)  # noqa: S311 - the papers' generator
    starts = [
        generator.randint(0, len(tokens) - draw.seqlen - 1)
        for _ in range(_number(draw, "positions"))
    ]
    return torch.stack([tokens[start : start + draw.seqlen] for start in starts])


def documents_at_random(documents: Sequence[str], join: str, encode: Encode, draw: Draw) -> Tensor:
    """Draw documents until one is longer than a window, and take a window anywhere in it.

    GPTQ's calibration on C4 and its first form of C4 for perplexity: one generator, seeded once,
    gives documents and places by `randint`.  `join` plays no part.
    """
    generator = random.Random(draw.seed)  # noqa: S311 - the papers' generator
    short: set[int] = set()
    windows = []
    for _ in range(_number(draw, "documents")):
        while len(short) < len(documents):
            number = generator.randint(0, len(documents) - 1)
            tokens = encode(documents[number])
            if len(tokens) > draw.seqlen:
                break
            short.add(number)
        else:
            raise draw.refuse(
                f"{len(documents):,} documents, none of more than {draw.seqlen} tokens",
                f"lower the window length or take {draw.where}.draw=shuffled",
            )
        start = generator.randint(0, len(tokens) - draw.seqlen - 1)
        windows.append(tokens[start : start + draw.seqlen])
    return torch.stack(windows)


DRAWS: dict[str, Callable[[Sequence[str], str, Encode, Draw], Tensor]] = {
    "first": first,
    "shuffled": shuffled,
    "positions": positions,
    "documents": documents_at_random,
}


def begin_with(token: int, windows: Tensor) -> Tensor:
    """Put a token in front of every window: [n, seqlen] -> [n, seqlen + 1]."""
    return torch.cat([windows.new_full((len(windows), 1), token), windows], dim=1)


def _number(draw: Draw, name: str) -> int:
    if draw.windows is None:
        raise ConfigError(f"{draw.where}.draw={name} needs a number of windows")
    return draw.windows


def _cut(tokens: Tensor, draw: Draw) -> Tensor:
    available = len(tokens) // draw.seqlen
    if available < (draw.windows or 1):
        found = f"{len(tokens)} tokens, i.e. {available} windows of {draw.seqlen}"
        raise draw.refuse(found, _shorter(draw))
    return tokens[: available * draw.seqlen].reshape(available, draw.seqlen)


def _shorter(draw: Draw) -> str:
    return f"lower {draw.where}.windows or the window length"
