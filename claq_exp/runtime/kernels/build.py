"""Compiles the C kernel on this machine, once, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from claq_exp.errors import ClaqError, telling_line
from claq_exp.sources.cache import cache_folder

SOURCE = Path(__file__).with_name("cpu.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-shared", "-fPIC")
NATIVE = ("-march=native",)
OPENMP = ("-fopenmp",)
SECONDS = 300  # that a compiler may take


class BuildError(ClaqError):
    """No library, and why, in one line."""


def library(instructions: tuple[str, ...] = NATIVE) -> ctypes.CDLL:
    """Return the loaded kernel, compiled unless the cache has it.

    instructions: compiler flags that choose the instruction set.  Raises BuildError without a
    compiler, or where none of the flags work.  Calls through the library release Python's lock.
    """
    outcome = _outcome(instructions)
    if isinstance(outcome, str):
        raise BuildError(outcome)
    return outcome


@cache  # failures too: a compiler is not asked once per layer
def _outcome(instructions: tuple[str, ...]) -> ctypes.CDLL | str:
    try:
        source = SOURCE.read_bytes()
    except OSError as error:
        return f"the source of the CPU kernel cannot be read: {error}"
    reasons = []
    for compiler in _compilers():
        for flags in _flags(instructions):
            try:
                return _load(compiler, flags, source)
            except (OSError, subprocess.SubprocessError) as error:
                reasons.append(_one_line(error))
    if not reasons:
        return f"the CPU kernel needs a C compiler; found none of {', '.join(COMPILERS)}"
    return f"the CPU kernel does not compile: {reasons[0]}"


def _compilers() -> list[str]:
    found = [path for name in COMPILERS if (path := shutil.which(name))]
    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]


def _flags(instructions: tuple[str, ...]) -> list[tuple[str, ...]]:
    # A compiler may lack OpenMP (one thread then) or not know its own machine (portable code then).
    choices = [(*FLAGS, *instructions, *OPENMP), (*FLAGS, *instructions)]
    return choices + ([(*FLAGS, *OPENMP), FLAGS] if instructions == NATIVE else [])


def _load(compiler: str, flags: tuple[str, ...], source: bytes) -> ctypes.CDLL:
    name = f"cpu-{_key(compiler, flags, source)}.so"
    folder = cache_folder() / "kernels"
    target = folder / name
    if target.exists():
        return ctypes.CDLL(str(target))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        built = _compile(compiler, flags, folder)
    except PermissionError:
        return _load_from_temporary_folder(compiler, flags)
    except OSError:
        if os.access(folder, os.W_OK):
            raise
        return _load_from_temporary_folder(compiler, flags)
    built.replace(target)  # at once, whoever else compiles the same
    return ctypes.CDLL(str(target))


def _load_from_temporary_folder(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="claq_exp-", ignore_cleanup_errors=True) as folder:
        return ctypes.CDLL(str(_compile(compiler, flags, Path(folder))))


def _compile(compiler: str, flags: tuple[str, ...], folder: Path) -> Path:
    """Return a new library in `folder`, complete but under a name of its own."""
    handle, name = tempfile.mkstemp(prefix=".cpu-", suffix=".so", dir=folder)
    os.close(handle)
    try:
        subprocess.run(
            [compiler, *flags, "-o", name, str(SOURCE)],
            check=True,
            capture_output=True,
            timeout=SECONDS,
        )
    except BaseException:
        Path(name).unlink()
        raise
    Path(name).chmod(0o755)
    return Path(name)


def _key(compiler: str, flags: tuple[str, ...], source: bytes) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60)
    parts = [source, " ".join(flags).encode(), version.stdout, _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """Describe what `-march=native` depends on: a cache may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    known = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(known))])


def _one_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").splitlines()
        told = [line for line in lines if "error" in line] or lines or ["no message"]
        return f"{Path(error.cmd[0]).name}: {told[0].strip()}"
    return telling_line(error)
