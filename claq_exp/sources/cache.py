"""The folder that keeps what was fetched or converted once."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EEXIST
from pathlib import Path

from claq_exp.errors import SourceError

LOG = logging.getLogger(__name__)
NOWHERE = Path(os.devnull)


def cache_folder() -> Path:
    """Return the cache: $CLAQ_EXP_CACHE, else claq_exp in $XDG_CACHE_HOME, else in ~/.cache.

    It need not be there, nor can it always be made: what is only kept for later goes unkept then.
    Without a home folder it is one that never can.
    """
    if folder := os.environ.get("CLAQ_EXP_CACHE"):
        return Path(folder).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "claq_exp"
    try:
        return Path.home() / ".cache" / "claq_exp"
    except RuntimeError:  # no $HOME, and the system does not know this person
        return NOWHERE / "claq_exp"


def fetch_log() -> Path:
    """Return the file for what other libraries say while something is fetched."""
    log = cache_folder() / "fetch.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
    except OSError:
        return NOWHERE
    return log


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`; it becomes `target` when the block ends without an error.

    Raises FileExistsError where another process was first: its folder stays, and the new one is
    dropped.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        try:
            folder.rename(target)
        except OSError as error:
            if target.is_dir():
                reason = "another process made this folder meanwhile; what this one made is dropped"
                raise FileExistsError(EEXIST, reason, str(target)) from error
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, which `fill` makes where it is not there.

    name: below the cache; says what is in it, so that whoever is first makes the same.
    Raises SourceError where the cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with published(target) as folder:
            fill(folder)
    except OSError as error:
        if target.is_dir():  # another process was first
            LOG.warning("%s: another process made it first; that one is used", target)
            return target
        if os.access(target.parent, os.W_OK):
            raise
        raise SourceError(
            f"the cache {cache_folder()} cannot be written ({error.strerror}); set CLAQ_EXP_CACHE "
            "to a folder that can"
        ) from error
    return target
