"""Safetensors files tensor by tensor, so that their content need never be in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from claq_exp.errors import CheckpointError

LENGTH = 8  # bytes that say how long the header is


def write_tensors(
    path: Path,
    like: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the file that `safetensors.torch.save_file` would write, facts in its header.

    like: name -> a tensor of the same shape and type, on any device, be it the meta device.
    tensors: (name, tensor) of each, in any order.
    Raises CheckpointError when the disk does not take it, or a tensor is not as announced.
    """
    header, places = _header(like, facts or {})
    missing = set(like)
    try:
        with path.open("wb") as file:
            file.write(header)
            for name, tensor in tensors:
                announced = like[name]
                if tensor.shape != announced.shape or tensor.dtype != announced.dtype:
                    raise CheckpointError(
                        f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, and not "
                        f"{announced.dtype} {list(announced.shape)} as announced"
                    )
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                file.seek(len(header) + places[name])
                file.write(flat.view(torch.uint8).numpy().data)
                missing.discard(name)
        path.chmod(0o644)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    if missing:
        raise CheckpointError(f"{path}: {min(missing)} was announced and not written")


def header_bytes(like: Mapping[str, Tensor]) -> int:
    """Return the size of a file's header, its length included."""
    return len(_header(like, {})[0])


def _header(like: Mapping[str, Tensor], facts: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a file, and where each tensor begins behind them.

    The library itself says how it would name the types and order the tensors.
    """
    stand_ins = save(
        {name: torch.empty(0, dtype=t.dtype) for name, t in like.items()}, {"format": "pt"}
    )
    described = json.loads(stand_ins[LENGTH:])
    described["__metadata__"].update(facts)
    places, reached = {}, 0
    for name, entry in described.items():
        if name == "__metadata__":
            continue
        size = like[name].numel() * like[name].element_size()
        entry["shape"], entry["data_offsets"] = list(like[name].shape), [reached, reached + size]
        places[name], reached = reached, reached + size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text, places


class FileTensors(Mapping[str, Tensor]):
    """Tensors of a file by what follows a prefix, read when they are asked for."""

    def __init__(self, path: Path, prefix: str, names: tuple[str, ...]) -> None:
        self._path, self._prefix, self._names = path, prefix, names

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self._prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Batches(Sequence[Tensor]):
    """The batches of a file of hidden states, mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getitem__(self, batch: Any) -> Any:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(str(range(self._count)[batch]))

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        with safe_open(self._path, framework="pt") as file:
            return len(list(file.keys()))
