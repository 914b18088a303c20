"""Run the default experiment on a tiny model on a GPU and on the CPU, and compare the results.

    python benchmarks/gpu_experiment.py
    python benchmarks/gpu_experiment.py --model FOLDER --text FILE

The model is a random Llama that is made in place, or a small one in a folder.  Everything is in
float32, so that what differs is the device.  The variants are: the checkpoint dense in memory,
packed, streamed block by block, with rounded activations; and the GPU's usual type.  Needs neither
Hydra nor lm-eval nor wandb nor datasets.  Exits with 1 where a limit is passed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import command_line, device_option, note, parse
from device_time import usable
from tiny_model import write_text, write_tiny_model

from claq_exp.config import (
    CalibrationConfig,
    CorpusConfig,
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
    RuntimeConfig,
)
from claq_exp.run.runner import run
from claq_exp.runtime.load import load_checkpoint
from claq_exp.tracking.progress import RunProgress

CORPUS = "words"
LIMITS = {  # what is compared -> by how much the device's may differ from the CPU's, relatively
    "original perplexity": 1e-3,  # the same float32 products in another order
    "linear bits": 0.0,  # counted by the plan
    "layer errors": 0.05,  # of all layers together: the GPU clusters by another heuristic
    "quantized perplexity": 0.02,
    "logits": 1e-3,  # of the same packed checkpoint by two kernels, over the largest
}
USUAL_TYPE = {**LIMITS, "original perplexity": 0.02, "quantized perplexity": 0.03}


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the default experiment's, and what they may change."""

    changes: dict[str, Any]
    limits: dict[str, float]


def variants(device: str) -> dict[str, Variant]:
    """Return what is run, by name."""
    triton = RuntimeConfig(kernel="triton")
    return {
        "dense": Variant({}, LIMITS),
        "packed": Variant({"runtime": triton}, LIMITS),
        "streamed": Variant({"stream": True}, LIMITS),
        "activations in 8 bits": Variant({"activation": {"name": "int", "bits": 8}}, LIMITS),
        "activations in LO-BCQ": Variant({"activation": {"name": "lo_bcq"}}, LIMITS),
        "the stored type": Variant({"dtype": "auto"}, USUAL_TYPE),
    }


def default_experiment(model: str, text: Path, seqlen: int, windows: int) -> ExperimentConfig:
    """Return the experiment that `claq-exp` runs by default, on this model and text.

    It is what conf/ composes, built without Hydra; strategies have their fields' own defaults.
    """
    return ExperimentConfig(
        model=ModelConfig(model, name="tiny", dtype="float32"),
        calibration=CalibrationConfig(path=str(text), windows=windows, seqlen=seqlen, batch_size=2),
        codebook={"name": "kmeans"},
        precision={"name": "outlier_order"},
        reservation={"name": "outlier_order"},
        solver={"name": "gptq"},
        embedding={"name": "kmeans", "required": False},
        evaluation=EvaluationConfig(
            corpora={CORPUS: CorpusConfig(path=str(text), windows=windows)},
            context=seqlen,
            kl_windows=2,
        ),
    )


@dataclass(frozen=True)
class Found:
    """What a run gave."""

    folder: Path
    results: dict[str, Any]
    seconds: float

    def measures(self) -> dict[str, float]:
        """Return what is compared between devices."""
        perplexity = self.results["perplexity"][CORPUS]
        with (self.folder / "layers.csv").open(newline="") as file:
            errors = [float(row["output_error"]) for row in csv.DictReader(file)]
        return {
            "original perplexity": perplexity["original"],
            "linear bits": self.results["bits"]["linear"],
            "layer errors": sum(errors),
            "quantized perplexity": perplexity["quantized"],
        }


def run_variant(base: ExperimentConfig, variant: Variant, device: str, folder: Path) -> Found:
    """Run one variant on one device, in a folder and with a cache of its own."""
    changes = dict(variant.changes)
    dtype = changes.pop("dtype", base.model.dtype) if device != "cpu" else base.model.dtype
    changes.pop("dtype", None)
    if device == "cpu":
        changes.pop("runtime", None)  # the oracle expands the layers
    config = replace(
        base,
        model=replace(base.model, dtype=dtype),
        device=device,
        outputs=str(folder / "runs"),
        **changes,
    )
    os.environ["CLAQ_EXP_CACHE"] = str(folder / "cache")  # or it would find the other's scores
    started = time.perf_counter()
    outcome = run(config, "gpu_experiment", progress=silent)
    return Found(outcome.folder, outcome.results, time.perf_counter() - started)


def silent(estimates: dict[str, float]) -> RunProgress:
    """Return a progress bar that shows nothing."""
    return RunProgress(estimates, on_share=lambda _share, _stage: None)


@torch.inference_mode()
def kernels_agree(checkpoint: Path, device: str, windows: int) -> float:
    """Return by how much logits of the packed checkpoint differ from the dense one's, relatively.

    One, three, nine and many tokens at once, for which the kernels take different ways.
    """
    packed, dense = (
        load_checkpoint(checkpoint, device=device, kernel=kernel) for kernel in ("triton", "dense")
    )
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for tokens in (1, 3, 9, 32)[:windows]:
        ids = torch.randint(packed.config.vocab_size, (1, tokens), generator=generator).to(device)
        expected = dense(ids).logits.double()
        miss = (packed(ids).logits.double() - expected).abs().max() / expected.abs().max()
        worst = max(worst, miss.item())
    return worst


def judge(
    asked: argparse.Namespace, name: str, variant: Variant, found: Found, oracle: Found
) -> bool:
    """Print and note a variant's figures beside the CPU's; tell whether all are within limits."""
    ours, theirs = found.measures(), oracle.measures()
    misses = {key: abs(ours[key] - theirs[key]) / abs(theirs[key]) for key in ours}
    retreats = found.results["fallbacks"].get("retreats", 0)
    if "runtime" in variant.changes:
        misses["logits"] = kernels_agree(found.folder / "checkpoint", asked.device, asked.kernels)
    over = [key for key, miss in misses.items() if not miss <= variant.limits[key]]
    if retreats:
        over.append(f"{retreats} layers retreated to the CPU")
    told = ", ".join(f"{key} {miss:.1e}" for key, miss in misses.items())
    verdict = "ok" if not over else f"OVER THE LIMIT: {', '.join(over)}"
    print(f"{name:22} {found.seconds:6.1f} s, CPU {oracle.seconds:6.1f} s; {told}; {verdict}")
    note(
        asked,
        variant=name,
        ok=not over,
        seconds=found.seconds,
        cpu_seconds=oracle.seconds,
        **{f"{key}, off by": miss for key, miss in misses.items()},
        **{f"{key}, limit": variant.limits[key] for key in misses},
        **{f"{key}, device": value for key, value in ours.items()},
        **{f"{key}, CPU": value for key, value in theirs.items()},
    )
    return not over


def outcomes(asked: argparse.Namespace, folder: Path) -> Iterator[bool]:
    """Run every variant that is asked for, and yield whether it kept to its limits."""
    model, text = asked.model, asked.text
    if model is None:
        model = folder / "model"
        write_tiny_model(
            model,
            hidden_size=asked.hidden,
            intermediate_size=asked.hidden * 3 // 2,
            num_hidden_layers=asked.blocks,
        )
    if text is None:
        text = folder / "words.txt"
        write_text(text)
    base = default_experiment(str(model), text, asked.seqlen, asked.windows)
    oracles: dict[str, Found] = {}
    for name, variant in variants(asked.device).items():
        if asked.variants and name not in asked.variants:
            continue
        activation = str(variant.changes.get("activation"))
        if activation not in oracles:
            oracles[activation] = run_variant(base, variant, "cpu", folder / f"cpu-{len(oracles)}")
        found = run_variant(base, variant, asked.device, folder / name.replace(" ", "-"))
        yield judge(asked, name, variant, found, oracles[activation])


def main() -> int:
    """Run, print and compare; return the exit code."""
    parser = command_line(__doc__)
    device_option(parser)
    parser.add_argument("--model", type=Path, help="a small model's folder, in place of a random")
    parser.add_argument("--text", type=Path, help="plain text, in place of random words")
    parser.add_argument("--hidden", type=int, default=256, help="width of the random model (256)")
    parser.add_argument("--blocks", type=int, default=4, help="of the random model (4)")
    parser.add_argument("--windows", type=int, default=16, help="of calibration and text (16)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a window (128)")
    parser.add_argument("--kernels", type=int, default=4, help="numbers of tokens to try (4)")
    parser.add_argument("--variants", nargs="+", choices=list(variants("cpu")), help="only these")
    quick = {"hidden": 48, "blocks": 1, "windows": 4, "seqlen": 32, "kernels": 1}
    asked = parse(parser, **quick, variants=["streamed", "packed"])
    if not usable(asked, "the default experiment"):
        return 2
    with tempfile.TemporaryDirectory(prefix="claq-gpu-") as folder:
        kept = list(outcomes(asked, Path(folder)))
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
