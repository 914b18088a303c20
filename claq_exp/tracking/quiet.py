"""Warnings and progress bars of third parties stay off the terminal."""

from __future__ import annotations

import io
import logging
import os
import sys
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


def show_what_can_be_shown() -> None:
    """Print a question mark for what the terminal's encoding lacks, e.g. in an ASCII locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
