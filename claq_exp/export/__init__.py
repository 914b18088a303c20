"""A packed checkpoint in the formats of other programs, one file for each format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from claq_exp.errors import ConfigError, one_of
from claq_exp.export.compressed_tensors import write_compressed_tensors
from claq_exp.export.dense import write_dense
from claq_exp.export.gguf import write_gguf
from claq_exp.export.gptq import write_gptq


class Writer(Protocol):
    """Writes a checkpoint in another format, published by rename."""

    def __call__(
        self, folder: Path, target: Path, *, dtype: str, trust_remote_code: bool = False
    ) -> None:
        """Raise ConfigError for what the format cannot say, CheckpointError for damage."""


@dataclass(frozen=True)
class Format:
    """A format.  dtypes: of what is not packed, the default first."""

    write: Writer
    dtypes: tuple[str, ...]


FORMATS = {
    "dense": Format(write_dense, ("float16", "bfloat16", "float32")),
    "gptq": Format(write_gptq, ("float16", "float32")),
    "compressed-tensors": Format(write_compressed_tensors, ("float16", "float32")),
    "gguf": Format(write_gguf, ("float16", "float32", "q8_0")),
}


def chosen(format_: str, dtype: str | None) -> tuple[Format, str]:
    """Return a format by its name, and a dtype: the format's default for None.

    Raises ConfigError for a name that is not known.
    """
    if format_ not in FORMATS:
        raise ConfigError(one_of("format", format_, FORMATS))
    found = FORMATS[format_]
    if dtype is not None and dtype not in found.dtypes:
        raise ConfigError(one_of(f"format={format_}: dtype", dtype, found.dtypes))
    return found, dtype or found.dtypes[0]


def export(
    folder: Path,
    target: Path,
    format_: str = "dense",
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the checkpoint in `folder` to `target`, in the format of that name.

    dtype: of what is not packed; the format's default where it is None.
    Raises ConfigError when `target` exists or cannot be made, and for what the format cannot say:
    the message names the layer.  Raises CheckpointError for a damaged checkpoint.
    """
    found, stored = chosen(format_, dtype)
    _check_target(folder, target)
    found.write(folder, target, dtype=stored, trust_remote_code=trust_remote_code)


def _check_target(folder: Path, target: Path) -> None:
    """Raise ConfigError unless a new file or folder can be made at `target`."""
    if target.exists():
        raise ConfigError(f"'{target}' exists already; name one that does not")
    parents = target.absolute().parents
    if folder.resolve() in target.resolve().parents:
        raise ConfigError(f"'{target}' is in the checkpoint itself; name a place outside of it")
    nearest = next(parent for parent in parents if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"'{target}' cannot be made, for '{nearest}' is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"'{target}' cannot be made, for '{nearest}' is read-only here")
