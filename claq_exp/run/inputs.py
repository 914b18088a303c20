"""Everything a run reads, fetched and checked before any long work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from claq_exp.calibration.overlap import shared_share
from claq_exp.calibration.windows import Draw
from claq_exp.checkpoint.manifest import asking_for_code
from claq_exp.config import FAMILIES, DrawnText, ExperimentConfig, TaskConfig
from claq_exp.evaluation.perplexity import Corpus
from claq_exp.evaluation.tasks import check_tasks, local_file, task_content
from claq_exp.models.bos import bos_rule
from claq_exp.models.context import check_context, check_vocabulary, context_length
from claq_exp.models.load import load_config, load_tokenizer
from claq_exp.models.source import (
    description_files,
    fingerprint,
    model_folder,
    tokenizer_fingerprint,
)
from claq_exp.number_formats.universal import codebook_file
from claq_exp.quantize.strategy import code_file
from claq_exp.run.cut import Origin, kept_windows
from claq_exp.sources.cache import sha256_of
from claq_exp.sources.content import Losses
from claq_exp.sources.text import text_content, text_files
from claq_exp.sources.weight_files import weight_files

TASK = "zero_shot."


@dataclass(frozen=True)
class Input:
    """One thing that a run reads.

    origin: hub id, address or path.  content: a hash of it.  files: where it lies; none where the
    library `datasets` keeps it.
    """

    origin: str
    content: str
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Fetched:
    """The folder of the model, and all inputs.

    Keys: calibration, corpora.*, zero_shot.*, model; *.books and *.code of strategies.
    """

    model: Path
    inputs: dict[str, Input]

    @property
    def contents(self) -> dict[str, str]:
        """A hash of the content of each input."""
        return {key: found.content for key, found in self.inputs.items()}

    @property
    def tasks(self) -> dict[str, str]:
        """Task -> a hash of all that defines its score."""
        return {
            key.removeprefix(TASK): found.content
            for key, found in self.inputs.items()
            if key.startswith(TASK)
        }


@dataclass(frozen=True)
class Tokens:
    """calibration: [windows, seqlen] int64, of a text with `losses`.  corpora: by name."""

    tokenizer: PreTrainedTokenizerBase
    calibration: Tensor
    losses: Losses
    corpora: dict[str, Corpus]

    @property
    def text_losses(self) -> dict[str, Losses]:
        """What was not read of each text: calibration and corpora.*."""
        return {"calibration": self.losses, **corpus_losses(self.corpora)}


@dataclass(frozen=True)
class Calibration:
    """What a run calibrates on.

    model: folder of the original in the Hugging Face layout.  windows: [windows, seqlen] int64.
    """

    model: Path
    windows: Tensor


def calibration_of(config: ExperimentConfig) -> Calibration:
    """Return model and calibration windows of an experiment; raises as `fetch`."""
    evaluation = replace(config.evaluation, corpora={}, zero_shot={})
    config = replace(config, evaluation=evaluation)
    fetched = fetch(config)
    return Calibration(fetched.model, tokenize_inputs(config, fetched.model).calibration)


def fetch(
    config: ExperimentConfig,
    note: Callable[[str], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Fetched:
    """Bring model, texts and task files here.

    note: called with what is about to be fetched.  say: with a line before something long.
    Raises ConfigError or SourceError for what is not to be had.
    """
    tasks = config.evaluation.zero_shot
    check_tasks(tasks)
    inputs = {}
    note(f"calibration text: {config.calibration.origin}")
    inputs["calibration"] = _text_input(config.calibration)
    for name, corpus in config.evaluation.corpora.items():
        note(f"corpus {name}: {corpus.origin}")
        inputs[f"corpora.{name}"] = _text_input(corpus)
    for name, task in tasks.items():
        note(f"task {name}: {task.data or 'the hub'}")
        inputs[f"{TASK}{name}"] = _task_input(name, task)
    for family in ("codebook", "activation"):
        if path := codebook_file(getattr(config, family).get("books")):
            inputs[f"{family}.books"] = Input(str(path), sha256_of(path), (path,))
    for family in FAMILIES:
        name = getattr(config, family).get("name", "")
        if path := code_file(name):  # a changed strategy makes another run
            inputs[f"{family}.code"] = Input(name, sha256_of(path), (path,))
    note(f"model {config.model.name}: {config.model.source}")
    folder = model_folder(config.model, say=say)
    asking_for_code(folder)  # reads what the checkpoint will hold a copy of, and must be readable
    held = {*description_files(folder), *weight_files(folder).files}
    inputs["model"] = Input(config.model.source, fingerprint(folder), tuple(sorted(held)))
    return Fetched(folder, inputs)


def reads_the_same(config: ExperimentConfig) -> str:
    """Return what is the same for experiments that `fetch` brings the same things for."""
    evaluation, books = config.evaluation, [config.codebook, config.activation]
    return repr(
        [config.model, config.calibration, evaluation.corpora, evaluation.zero_shot, *books]
    )


def _text_input(text: DrawnText) -> Input:
    return Input(text.origin, text_content(text), tuple(text_files(text) or ()))


def _task_input(name: str, task: TaskConfig) -> Input:
    files = (local_file(name, "data", task), local_file(name, "shots_data", task))
    there = tuple(path for path in files if path is not None)
    return Input(task.data or "the hub", task_content(name, task), there)


def tokenize_inputs(
    config: ExperimentConfig, folder: Path, contents: Mapping[str, str] | None = None
) -> Tokens:
    """Cut all token windows, or find those that were cut before.

    contents: as in `Fetched`, where windows are to be kept.  Raises ConfigError when a text is too
    short or a window too long.
    """
    remote = config.model.trust_remote_code
    tokenizer = load_tokenizer(folder, trust_remote_code=remote)
    model_config = load_config(folder, trust_remote_code=remote)
    origin = None if contents is None else Origin(tokenizer_fingerprint(folder), contents)
    calibration = config.calibration
    check_context("calibration.seqlen", calibration.seqlen, model_config)
    draw = Draw(calibration.windows, calibration.seqlen, calibration.seed, "calibration")
    rule = bos_rule(calibration.bos, model_config)
    windows, losses = kept_windows(calibration, draw, tokenizer, rule, origin)
    check_vocabulary("calibration", windows, model_config)
    corpora = {
        name: replace(corpus, overlap=shared_share(corpus.windows, windows))
        for name, corpus in corpus_windows(config, tokenizer, model_config, origin).items()
    }
    return Tokens(tokenizer, windows, losses, corpora)


def corpus_losses(corpora: Mapping[str, Corpus]) -> dict[str, Losses]:
    """Return what was not read of each corpus, as corpora.NAME."""
    return {f"corpora.{name}": corpus.losses for name, corpus in corpora.items()}


def corpus_windows(
    config: ExperimentConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    origin: Origin | None = None,
) -> dict[str, Corpus]:
    """Return the corpora by name; their windows are kept where `origin` says what they depend on.

    Raises ConfigError when a text is too short or a window too long.
    """
    evaluation = config.evaluation
    if not evaluation.corpora:
        return {}
    seqlen = context_length(evaluation.context, model_config)
    rule = bos_rule(evaluation.bos, model_config)
    corpora = {}
    for name, corpus in evaluation.corpora.items():
        draw = Draw(corpus.windows, seqlen, corpus.seed, f"evaluation.corpora.{name}")
        windows, losses = kept_windows(corpus, draw, tokenizer, rule, origin)
        corpora[name] = Corpus(windows, rule, losses=losses)
        check_vocabulary(draw.where, corpora[name].windows, model_config)
    return corpora
