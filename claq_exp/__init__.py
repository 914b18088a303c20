"""Experiments with column-level adaptive weight quantization (CLAQ) of large language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

__version__ = "0.1.0"


def load(folder: str | Path, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a quantized checkpoint; see `claq_exp.checkpoint.reader.load_model`."""
    from claq_exp.checkpoint.reader import load_model  # torch is only imported when it is needed

    return load_model(folder, dtype=dtype, device=device)
