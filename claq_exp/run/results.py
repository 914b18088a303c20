"""results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any

from claq_exp.checkpoint.writer import Sizes
from claq_exp.config import ExperimentConfig
from claq_exp.evaluation.divergence import Divergence
from claq_exp.evaluation.measure import Measurement
from claq_exp.evaluation.perplexity import Corpus
from claq_exp.evaluation.zero_shot import average_accuracy
from claq_exp.models.original import Original
from claq_exp.run.stages import TIMINGS
from claq_exp.run_folder import SCHEMA
from claq_exp.run_folder.fallbacks import count_fallbacks
from claq_exp.run_folder.windows import WINDOW_FIELDS
from claq_exp.sources.content import Losses
from claq_exp.system.machine import device_name, git_commit, versions
from claq_exp.system.resources import peak_memory
from claq_exp.system.torchrun import place


def build_results(  # noqa: PLR0913 - one argument per part of the file
    *,
    config: ExperimentConfig,
    hash_: str,
    command: str,
    started: datetime,
    device: str,
    sizes: Sizes,
    activation_bits: float | None,
    original_bytes: int,
    corpora: Mapping[str, Corpus],
    losses: Mapping[str, Losses],
    original: Measurement,
    quantized: Measurement,
    kl: dict[str, Divergence],
    after: Mapping[str, tuple[Measurement, dict[str, Divergence]]],
    spent: dict[str, float],
    report: list[dict[str, Any]],
    source: Original,
    kept_ends: str,
) -> dict[str, Any]:
    """Return the content of results.json (schema 1); a value that is not finite is null."""
    finished = datetime.now(UTC)
    return {
        "schema": SCHEMA,
        "status": "finished",
        "run": {
            "id": f"{config.name}-{hash_[:8]}",
            "hash": hash_,
            "command": command,
            "started": started.isoformat(timespec="seconds"),
            "finished": finished.isoformat(timespec="seconds"),
            "seconds": round((finished - started).total_seconds(), 3),
            "versions": versions(),
            "device": device_name(device),
            "processes": place().size,
            "git": git_commit(),
        },
        "config": config.as_dict(),
        "source": source.as_dict(),
        "bits": {
            "nominal": sizes.nominal,
            "linear": sizes.linear,
            "model": sizes.model,
            "activation": activation_bits,
            "ledger": sizes.ledger.as_dict(),
        },
        "size": {"checkpoint_bytes": sizes.bytes, "original_bytes": original_bytes},
        "texts": text_rows(losses),
        "perplexity": perplexity_rows(corpora, original, quantized),
        "kl": kl_rows(kl),
        "zero_shot": zero_shot_rows(original, quantized),
        "average_accuracy": average_row(original, quantized),
        **after_rows(after),
        "timings": {key: round(spent.get(key, 0.0), 3) for key in TIMINGS},
        "peak_memory_bytes": max(peak_memory(), int(spent.get("peak_memory_bytes", 0))),
        "fallbacks": count_fallbacks(report, kept_ends),
    }


def text_rows(losses: Mapping[str, Losses]) -> dict[str, Any]:
    """Return text -> how many records were skipped and how many characters are damaged."""
    return {
        name: {"records_skipped": lost.skipped, "characters_damaged": lost.damaged}
        for name, lost in losses.items()
    }


def perplexity_rows(
    corpora: Mapping[str, Corpus], original: Measurement | None, quantized: Measurement
) -> dict[str, Any]:
    """Return corpus -> values of both models on the same tokens, and what tokens those are."""
    rows = {}
    for name, measured in quantized.perplexity.items():
        before = original.perplexity[name] if original else None
        rows[name] = {
            "original": finite(before.value) if before else None,
            "quantized": finite(measured.value),
            "seqlen": measured.seqlen,
            "tokens": measured.tokens,
            "tokens_sha256": measured.tokens_sha256,
            "bos": corpora[name].bos,
            "overlap": corpora[name].overlap,
        }
    return rows


def kl_rows(kl: dict[str, Divergence]) -> dict[str, Any]:
    """Return corpus -> divergence from the original, for the corpora where it was measured."""
    return {
        name: {
            "mean": finite(row.mean),
            "top1_agreement": row.top1_agreement,
            "tokens": row.tokens,
        }
        for name, row in kl.items()
    }


def window_rows(
    corpora: Mapping[str, Corpus],
    original: Measurement | None,
    quantized: Measurement,
    kl: Mapping[str, Divergence],
) -> list[dict[str, Any]]:
    """Return the rows of windows.csv: sums over the tokens of each window of each corpus.

    None for what was not measured: the original, or the KL beyond the first windows.
    """
    rows = []
    for name, corpus in corpora.items():
        nll = quantized.perplexity[name].window_nll
        before = original.perplexity[name].window_nll if original else ()
        divergence = kl[name].window_kl if name in kl else ()
        sums = zip_longest(corpus.window_contents(), before, nll, divergence)
        for number, (content, *measured) in enumerate(sums):
            tokens = corpus.windows.shape[1] - 1
            rows.append(
                dict(zip(WINDOW_FIELDS, (name, number, tokens, content, *measured), strict=True))
            )
    return rows


def zero_shot_rows(original: Measurement | None, quantized: Measurement) -> dict[str, Any]:
    """Return task -> values of both models on the same requests; the rest is of the quantized."""
    rows = {}
    for name, score in quantized.zero_shot.items():
        row = {key: value for key, value in asdict(score).items() if key != "value"}
        before = original.zero_shot[name].value if original else None
        rows[name] = {
            **row,
            "metrics": {metric: finite(value) for metric, value in score.metrics.items()},
            "original": None if before is None else finite(before),
            "quantized": finite(score.value),
        }
    return rows


def average_row(original: Measurement | None, quantized: Measurement) -> dict[str, Any] | None:
    """Return the mean accuracy of both models over the tasks that have one, if two or more do."""
    after = average_accuracy(quantized.zero_shot)
    if after is None:
        return None
    before = average_accuracy(original.zero_shot) if original else None
    return {"original": before, "quantized": after}


def after_rows(
    after: Mapping[str, tuple[Measurement, dict[str, Divergence]]],
) -> dict[str, dict[str, Any]]:
    """Return `after`: stage -> values of the model as it stood then; nothing without a stage."""
    rows = {
        stage: {
            "perplexity": {name: finite(p.value) for name, p in measured.perplexity.items()},
            "kl": {name: finite(row.mean) for name, row in kl.items()},
            "zero_shot": {name: finite(score.value) for name, score in measured.zero_shot.items()},
            "average_accuracy": average_accuracy(measured.zero_shot),
        }
        for stage, (measured, kl) in after.items()
    }
    return {"after": rows} if rows else {}


def finite(value: float) -> float | None:
    """Return the value, or None for what JSON cannot say."""
    return value if math.isfinite(value) else None
