"""What a person is told of an error that nobody expected, and the file that goes with a report."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sysconfig
import tempfile
import time
import traceback
from pathlib import Path

from claq_exp import __version__
from claq_exp.errors import telling_line
from claq_exp.sources.cache import cache_folder

PACKAGE = Path(__file__).resolve().parents[1]
MEMORY = ("OutOfMemoryError", "MemoryError")
NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, in Python, on the CPU or on a GPU."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & set(MEMORY)) or any(text in str(error) for text in NO_MEMORY)


def explain_bug(error: BaseException, command: str) -> str:
    """Return two lines for an error that is no refusal: what, where, and what to do with it.

    The traceback goes into a file of the cache, with the command and all versions.
    """
    what = f"{type(error).__name__}: {telling_line(error)}"
    if isinstance(error, KeyError):
        what = telling_line(error)
    place, own = _place(error)
    log = _written(error, command)
    if is_out_of_memory(error):
        return (
            f"memory ran out {place}: {telling_line(error)}\n"
            f"claq-exp plan says what each stage takes; the traceback is in {log}"
        )
    if own:
        return f"{what} {place}, which is no part of claq_exp\nThe traceback is in {log}"
    return (
        f"this is a bug: {what} {place}\n"
        f"Please report it and attach {log} (traceback, command, versions); --debug shows the "
        "traceback here"
    )


def _place(error: BaseException) -> tuple[str, bool]:
    """Return the innermost line that is no library's, and whether it is a person's own."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    for frame in reversed(frames):
        path = Path(frame.filename).resolve()
        ours = path.is_relative_to(PACKAGE)
        if ours or (path.is_file() and not any(path.is_relative_to(place) for place in libraries)):
            return f"(in {path}, line {frame.lineno}, {frame.name})", not ours
    return "(nowhere in claq_exp)", False


def _written(error: BaseException, command: str) -> Path | str:
    """Write down all that helps, in the cache or where temporary files go."""
    about = [f"command: {command}", f"folder: {_here()}", f"claq_exp: {__version__}"]
    about.append(f"platform: {platform.platform()}")
    with contextlib.suppress(Exception):  # a broken installation is what this may be about
        from claq_exp.system.machine import versions

        about.append(f"versions: {json.dumps(versions())}")
    text = "\n".join([*about, "", "".join(traceback.format_exception(error))])
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for parent in (cache_folder() / "bugs", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            parent.mkdir(parents=True, exist_ok=True)
            path = parent / f"claq-exp-{name}"
            path.write_text(text, encoding="utf-8", errors="replace")
            return path
    return "no file, for none could be written"


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "gone"
