"""Experiments with column-level adaptive weight quantization (CLAQ) of large language models.

After `import claq_exp`, transformers' `from_pretrained` loads packed checkpoints, and PEFT puts
LoRA adapters on their layers.
"""

from __future__ import annotations

import importlib
import shlex
from typing import TYPE_CHECKING

from claq_exp.system.hooks import on_import

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from claq_exp.run.inputs import Calibration
    from claq_exp.run.runner import Outcome

__version__ = "0.1.0"


def load(
    folder: str | Path, *, dtype: str = "float32", device: str = "cpu", kernel: str = "auto"
) -> PreTrainedModel:
    """Load a quantized checkpoint, strictly; see `claq_exp.runtime.load.load_checkpoint`."""
    from claq_exp.runtime.load import load_checkpoint  # torch is only imported when it is needed

    return load_checkpoint(folder, dtype=dtype, device=device, kernel=kernel)


def run_experiment(*words: str, settings: Mapping[str, object] | None = None) -> Outcome:
    """Run one experiment, as `claq-exp run` does: quantize a model and measure it.

    words: as on the command line, e.g. "model=hf", "precision.target_bits=2.5".
    settings: KEY -> value in place of a word, for any value, e.g. {"model.source": folder}.
    Returns the run's folder, the content of its results.json, and whether the run was found
    finished.  Raises ConfigError, in one line, for words that cannot be carried out.
    """
    from claq_exp.compose.experiment import compose_config
    from claq_exp.compose.words import word_of
    from claq_exp.run.runner import run

    overrides = [*words, *(word_of(key, value) for key, value in (settings or {}).items())]
    return run(compose_config(overrides), shlex.join(["claq-exp", *overrides]))


def calibration_inputs(*words: str, settings: Mapping[str, object] | None = None) -> Calibration:
    """Return what a run would calibrate on, for quantizers of others: model and token windows.

    words, settings: as of `run_experiment`.  The result has `model`, the original's folder in the
    Hugging Face layout, and `windows`, [windows, seqlen] int64.  Raises ConfigError as there.
    """
    from claq_exp.compose.experiment import compose_config
    from claq_exp.compose.words import word_of
    from claq_exp.run.inputs import calibration_of

    overrides = [*words, *(word_of(key, value) for key, value in (settings or {}).items())]
    return calibration_of(compose_config(overrides))


on_import(
    "transformers.quantizers.auto", lambda: importlib.import_module("claq_exp.runtime.huggingface")
)
on_import("peft.tuners.lora.config", lambda: importlib.import_module("claq_exp.runtime.adapters"))
