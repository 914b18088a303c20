"""Writes that either happen or do not, and the list of what a folder must hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.sources.cache import sha256_of

MANIFEST = "manifest.json"


def write_json(path: Path, data: Any) -> None:
    """Replace a file by JSON: written beside it, synced, renamed.  NaN and infinity are refused."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


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
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def write_manifest(folder: Path) -> None:
    """List size and sha256 of every file of the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files})


def check_manifest(folder: Path) -> None:
    """Raise CheckpointError unless every listed file is there, whole and unchanged."""
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST} lists no files")
    for name, facts in files.items():
        path = folder / name
        if path.name != name or not path.is_file() or not isinstance(facts, dict):
            raise CheckpointError(f"{folder} lacks the file '{name}' of its manifest")
        if path.stat().st_size != facts.get("bytes") or sha256_of(path) != facts.get("sha256"):
            raise CheckpointError(f"{path} is not the file that was written: size or sha256 differ")
