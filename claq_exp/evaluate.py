"""Measures a checkpoint that exists."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from claq_exp.checkpoint.files import write_json
from claq_exp.checkpoint.find import checkpoint_folder
from claq_exp.checkpoint.reader import read_layouts
from claq_exp.checkpoint.writer import checkpoint_sizes
from claq_exp.config import ExperimentConfig
from claq_exp.errors import ConfigError
from claq_exp.evaluation.measure import Meter
from claq_exp.evaluation.scores import ScoreStore, code_content
from claq_exp.evaluation.tasks import check_tasks, task_content
from claq_exp.inputs import corpus_windows
from claq_exp.machine import choose_device, device_name, git_commit, settle, versions
from claq_exp.measuring import activation_bits, checkpoint_subject
from claq_exp.models.load import DTYPES, forward_dtype, load_config, load_tokenizer
from claq_exp.models.skeleton import dense_parameter_count
from claq_exp.needs import wants_stream
from claq_exp.reporting.results import average_row, perplexity_rows, zero_shot_rows
from claq_exp.sources.cache import fetch_log
from claq_exp.sources.model import fingerprint
from claq_exp.tracking.progress import RunProgress, noise_to


def evaluate_checkpoint(config: ExperimentConfig, command: str) -> tuple[dict[str, Any], Path]:
    """Measure `config.checkpoint` on `config.evaluation`; return the results and their file.

    Raises ConfigError without a checkpoint, CheckpointError for a damaged one.
    """
    if config.checkpoint is None:
        raise ConfigError(
            "evaluate needs checkpoint=FOLDER, e.g. checkpoint=outputs/default/RUN/checkpoint"
        )
    folder = checkpoint_folder(config.checkpoint)
    layouts = read_layouts(folder)
    remote = config.model.trust_remote_code
    device = choose_device(config.device)
    settle(config.seed, config.threads)
    tasks = config.evaluation.zero_shot
    with noise_to(fetch_log()):
        check_tasks(tasks)
        contents = {name: task_content(name, task) for name, task in tasks.items()}
        model_config = load_config(folder, trust_remote_code=remote)
    dtype = forward_dtype(config.model.dtype, model_config, device)
    config = config.with_dtype(dtype)
    settings = {
        "checkpoint": str(folder.resolve()),
        "dtype": dtype,
        "evaluation": asdict(config.evaluation),
        "runtime": asdict(config.runtime),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    target = Path(config.outputs).expanduser() / config.name / f"evaluation-{digest}"
    with noise_to(fetch_log()):
        tokenizer = load_tokenizer(folder, trust_remote_code=remote)
        corpora = corpus_windows(config, tokenizer, model_config)
    target.mkdir(parents=True, exist_ok=True)
    parameters = dense_parameter_count(model_config)
    with RunProgress({"evaluate": 60}) as progress, noise_to(target / "third_party.log"):
        whole = parameters * DTYPES[dtype].itemsize
        streams = wants_stream(config.stream_choice(), whole, device, tasks=bool(tasks))
        subject = checkpoint_subject(config, folder, device, streams=streams)
        progress.stage("evaluate")
        about = {"settings": settings, "versions": versions(), "code": code_content()}
        store = ScoreStore(target / "scores", {**about, "model": fingerprint(folder)})
        vocabulary = model_config.get_text_config().vocab_size
        meter = Meter(
            subject, vocabulary, tokenizer, device, store, contents, on_share=progress.advance
        )
        measured = meter.measure(corpora, config.evaluation)
    sizes = checkpoint_sizes(folder, layouts, parameters)
    results = {
        "schema": 1,
        "status": "evaluated",
        "run": {
            "command": command,
            "device": device_name(device),
            "versions": versions(),
            "git": git_commit(),
        },
        **settings,
        "bits": {
            "nominal": sizes.nominal,
            "linear": sizes.linear,
            "model": sizes.model,
            "activation": activation_bits(folder, layouts),
            "ledger": sizes.ledger.as_dict(),
        },
        "size": {"checkpoint_bytes": sizes.bytes, "original_bytes": 2 * parameters},
        "perplexity": perplexity_rows(corpora, None, measured),
        "kl": {},  # there is no original to compare with
        "zero_shot": zero_shot_rows(None, measured),
        "average_accuracy": average_row(None, measured),
    }
    write_json(target / "results.json", results)
    shutil.rmtree(target / "scores")  # the next time measures again
    return results, target / "results.json"
