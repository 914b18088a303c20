"""Token windows of a text, cut once and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from claq_exp.calibration.windows import DRAWS, Draw, begin_with
from claq_exp.models.bos import bos_token
from claq_exp.models.chat import chat_writer
from claq_exp.models.load import tokenize
from claq_exp.sources.code import code_behind
from claq_exp.sources.content import Losses
from claq_exp.sources.kept import kept_tensors
from claq_exp.sources.text import read_documents, text_files

if TYPE_CHECKING:
    from claq_exp.config import DrawnText

NOT_READ = (  # fields of a text that its content or its draw stands for
    *("source", "path", "sha256", "revision", "files"),
    *("windows", "seqlen", "batch_size", "seed", "bos"),
)


@dataclass(frozen=True)
class Origin:
    """What windows are made of.  tokenizer: a hash of its files.  contents: text -> hash of it."""

    tokenizer: str
    contents: Mapping[str, str]


def kept_windows(
    text: DrawnText,
    draw: Draw,
    tokenizer: PreTrainedTokenizerBase,
    rule: str,
    origin: Origin | None,
) -> tuple[Tensor, Losses]:
    """Return the windows of a text, [windows, seqlen] int64, and what was not read of it.

    origin: where the windows are to be kept for the next time.  rule: of the beginning-of-text
    token.  Raises ConfigError when the text is too short.
    """
    if origin is None:
        return cut_windows(text, draw, tokenizer, rule)
    key = {
        "text": origin.contents[draw.where.removeprefix("evaluation.")],
        "kinds": [path.suffixes for path in text_files(text) or ()],
        "reading": {name: value for name, value in vars(text).items() if name not in NOT_READ},
        "draw": [draw.windows, draw.seqlen, draw.seed],
        "bos": rule,
        "tokenizer": origin.tokenizer,
        "versions": [transformers.__version__, tokenizers.__version__],
        "code": code_behind(__name__),
    }

    def make() -> dict[str, Tensor]:
        windows, losses = cut_windows(text, draw, tokenizer, rule)
        counts = torch.tensor([losses.skipped, losses.damaged])
        return {"windows": windows.contiguous(), "losses": counts}

    kept = kept_tensors("tokens", key, make)
    return kept["windows"], Losses(*kept["losses"].tolist())


def cut_windows(
    text: DrawnText, draw: Draw, tokenizer: PreTrainedTokenizerBase, rule: str
) -> tuple[Tensor, Losses]:
    """Read a text and cut its windows; see `kept_windows`."""
    token = bos_token(rule, tokenizer, draw.where.partition(".")[0])
    special = token is None and not text.chat  # chat templates have special tokens of their own

    def encode(passage: str) -> Tensor:
        return tokenize(tokenizer, passage, special=special)

    losses = Losses()
    write = chat_writer(tokenizer, draw.where) if text.chat else str
    documents = read_documents(text, losses, write)
    if token is None:
        return DRAWS[text.draw](documents, text.join, encode, draw), losses
    body = Draw(draw.windows, draw.seqlen - 1, draw.seed, draw.where)
    return begin_with(token, DRAWS[text.draw](documents, text.join, encode, body)), losses
