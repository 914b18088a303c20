"""Writes that either happen or do not, and reads that take nothing for granted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from claq_exp.errors import CheckpointError


def write_json(path: Path, data: Any, indent: int | None = 2) -> None:
    """Replace a file by JSON: written beside it, synced, renamed.  NaN and infinity are refused."""
    write_bytes(path, _encoded(data, indent))


def json_bytes(data: Any) -> int:
    """Return the size of the file that `write_json` would write."""
    return len(_encoded(data, 2))


def _encoded(data: Any, indent: int | None) -> bytes:
    return (json.dumps(data, indent=indent, allow_nan=False) + "\n").encode()


def json_safe(value: Any) -> Any:
    """Return data as JSON can say it: null for NaN and infinity, text for keys."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): json_safe(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(own) for own in value]
    return value


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file: written beside it, synced, renamed, and the folder synced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file.  Raises CheckpointError when the disk does not take it."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors leaves it to its writer alone
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises CheckpointError when the file holds anything else."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def parse_json(content: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8.  Raises ValueError, also for a key that is there twice."""
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error
    if not isinstance(data, dict):
        raise ValueError("it holds no JSON object")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key of a JSON object is there twice")
    return data
