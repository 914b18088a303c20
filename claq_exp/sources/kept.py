"""Tensors that were computed before, found by everything that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from claq_exp.sources.cache import cache_folder
from claq_exp.system.files import write_bytes


def kept_tensors(
    kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what `make` returned for the same key before, or call it and keep the result.

    kind: folder of the cache.  key: JSON data of all that the tensors depend on: hashes of content
    and code, versions and settings, never names or times.  What cannot be read, or is not what was
    written, is made again.
    """
    text = json.dumps(key, sort_keys=True)
    path = cache_folder() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    found = read_tensors(path, text)
    if found is not None:
        return found
    tensors = make()
    with contextlib.suppress(OSError):  # a cache that is full or cannot be written keeps nothing
        write_tensors(path, text, tensors)
    return tensors


def digest_of(tensor: Tensor) -> str:
    """Return a hash of a tensor's shape and content."""
    return _digest({"": tensor})


def write_tensors(path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors in a file of their own, which is whole or not there.  key: as `read_tensors`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(dict(tensors), {"key": key, "sha256": _digest(tensors)}))


def read_tensors(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return what `write_tensors` kept under a key; None where that is not what the file holds."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:  # noqa: BLE001 - missing, cut short or another file: it is made again
        return None
    if metadata.get("key") != key or metadata.get("sha256") != _digest(tensors):
        return None
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
