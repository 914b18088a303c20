"""Everything a run reads, fetched and checked before any long work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from claq_exp.calibration.windows import first_windows, sample_windows
from claq_exp.config import ExperimentConfig
from claq_exp.errors import ConfigError
from claq_exp.evaluation.zero_shot import stock_task, task_data
from claq_exp.models.load import load_config, load_tokenizer, tokenize
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.model import fingerprint, model_folder
from claq_exp.sources.text import TextSource, read_text, text_file


@dataclass(frozen=True)
class Fetched:
    """Local places of all inputs, and a hash of the content of each."""

    model: Path
    contents: dict[str, str]


@dataclass(frozen=True)
class Tokens:
    """calibration: [windows, seqlen] int64.  corpora: name -> [windows, seqlen] int64."""

    tokenizer: PreTrainedTokenizerBase
    calibration: Tensor
    corpora: dict[str, Tensor]


def fetch(config: ExperimentConfig) -> Fetched:
    """Bring model, texts and task files here.

    Raises ConfigError or SourceError for what is not to be had.
    """
    for name in config.evaluation.zero_shot:
        stock_task(name)
    contents = {"calibration": _text_content(config.calibration.text)}
    for name, corpus in config.evaluation.perplexity.items():
        contents[f"perplexity.{name}"] = _text_content(corpus.text)
    for name, task in config.evaluation.zero_shot.items():
        data = task_data(name, task)
        contents[f"zero_shot.{name}"] = sha256_of(data) if data else f"hub:{name}"
    folder = model_folder(config.model)
    contents["model"] = fingerprint(folder)
    return Fetched(folder, contents)


def tokenize_inputs(config: ExperimentConfig, folder: Path) -> Tokens:
    """Cut all token windows.  Raises ConfigError when a text is too short or a window too long."""
    remote = config.model.trust_remote_code
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    model_config = load_config(folder, trust_remote_code=remote)
    calibration = config.calibration
    _check_context("calibration", calibration.seqlen, model_config)
    windows = sample_windows(
        tokenize(tokenizer, read_text(calibration.text)),
        calibration.windows,
        calibration.seqlen,
        config.seed,
        "calibration",
    )
    return Tokens(tokenizer, windows, corpus_windows(config, tokenizer, model_config))


def corpus_windows(
    config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
) -> dict[str, Tensor]:
    """Return corpus name -> its windows, [n, seqlen] int64.

    Raises ConfigError when a text is too short or a window too long.
    """
    windows = {}
    for name, corpus in config.evaluation.perplexity.items():
        where = f"evaluation.perplexity.{name}"
        _check_context(where, corpus.seqlen, model_config)
        tokens = tokenize(tokenizer, read_text(corpus.text))
        windows[name] = first_windows(tokens, corpus.windows, corpus.seqlen, where)
    return windows


def _check_context(where: str, seqlen: int, model_config: PretrainedConfig) -> None:
    context = getattr(model_config, "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise ConfigError(f"{where}.seqlen is {seqlen}, the model's context {context}; lower it")


def _text_content(text: TextSource) -> str:
    path = text_file(text)
    if path is not None:
        return sha256_of(path)
    return hashlib.sha256(read_text(text).encode()).hexdigest()  # brings a data set of the hub here
