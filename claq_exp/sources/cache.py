"""The folder that keeps what was fetched or converted once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache: $CLAQ_EXP_CACHE, else claq_exp in $XDG_CACHE_HOME, else in ~/.cache."""
    if folder := os.environ.get("CLAQ_EXP_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "claq_exp"


def fetch_log() -> Path:
    """Return the file for what other libraries say while something is fetched."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return cache_folder() / "fetch.log"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`; it becomes `target` when the block ends without an error.

    Where another process was first, its folder stays and this one is dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
