"""Experiments with column-level adaptive weight quantization (CLAQ) of large language models.

After `import claq_exp`, transformers' `from_pretrained` loads packed checkpoints, and PEFT puts
LoRA adapters on their layers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from claq_exp.system.hooks import on_import

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

__version__ = "0.1.0"


def load(
    folder: str | Path, *, dtype: str = "float32", device: str = "cpu", kernel: str = "auto"
) -> PreTrainedModel:
    """Load a quantized checkpoint, strictly; see `claq_exp.runtime.load.load_checkpoint`."""
    from claq_exp.runtime.load import load_checkpoint  # torch is only imported when it is needed

    return load_checkpoint(folder, dtype=dtype, device=device, kernel=kernel)


on_import(
    "transformers.quantizers.auto", lambda: importlib.import_module("claq_exp.runtime.huggingface")
)
on_import("peft.tuners.lora.config", lambda: importlib.import_module("claq_exp.runtime.adapters"))
