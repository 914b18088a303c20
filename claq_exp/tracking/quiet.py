"""Warnings and progress bars of third parties stay off the terminal."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence the libraries that this process imports from now on."""
    warnings.filterwarnings("ignore")
    logging.captureWarnings(capture=True)
    for name in (
        "TOKENIZERS_PARALLELISM",
        "TRANSFORMERS_VERBOSITY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
        "HF_HUB_VERBOSITY",
        "DATASETS_VERBOSITY",
    ):
        value = "error" if name.endswith("VERBOSITY") else "1"
        os.environ.setdefault(name, "false" if name == "TOKENIZERS_PARALLELISM" else value)
