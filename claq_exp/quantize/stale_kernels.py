"""Compiled column loops are kept between processes, and must not outlive their source."""

from __future__ import annotations

import contextlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
COMPILED = ("quantize/codebook", "quantize/solver", "number_formats")  # folders with such loops


def drop_stale_kernels() -> None:
    """Delete compiled column loops that are older than a source file they were made of.

    numba looks at the file of a function alone, and not at those of the functions that it calls.
    """
    folders = [PACKAGE / name for name in COMPILED]
    newest = max(file.stat().st_mtime for folder in folders for file in folder.glob("*.py"))
    for compiled in (file for folder in folders for file in folder.glob("__pycache__/*.nb[ic]")):
        with contextlib.suppress(OSError):  # gone, or not ours to delete
            if compiled.stat().st_mtime < newest:
                compiled.unlink()
