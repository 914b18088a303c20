"""The tensors that a checkpoint of another owner stores, from the headers of its files."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claq_exp.errors import CheckpointError, telling_line
from claq_exp.foreign.found import Foreign
from claq_exp.tensor_files.shards import INDEX_FILE, read_header

if TYPE_CHECKING:
    from torch import Tensor

PICKLED = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Stored:
    """A stored tensor.

    kind: its type, as the file calls it (`I32`, `Q4_K`).  shape: as the file gives it; of a GGUF
    tensor the numbers and not the bytes.  code_bits: that hqq writes beside it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    code_bits: float | None = None


@dataclass(frozen=True)
class Headers:
    """All tensors of a checkpoint, and the bytes of each file that is counted.

    Counted are weights, their index and config.json; of a GGUF file the whole, with its vocabulary.
    """

    tensors: tuple[Stored, ...]
    files: dict[Path, int]

    @property
    def bytes(self) -> int:
        """All that is counted."""
        return sum(self.files.values())

    @property
    def beside(self) -> int:
        """Bytes that hold no tensor: headers, descriptions, padding between tensors."""
        return self.bytes - sum(tensor.bytes for tensor in self.tensors)


def read_headers(foreign: Foreign) -> Headers:
    """Read the headers of a checkpoint's files.

    Raises ConfigError where it has no weights, CheckpointError for a file that cannot be read.
    """
    weights = foreign.weight_files()
    tensors: list[Stored] = []
    for path in weights:
        tensors += _tensors(path)
    described = [foreign.path / name for name in ("config.json", INDEX_FILE)]
    files = [*weights, *(path for path in described if path.is_file())]
    headers = Headers(tuple(tensors), {path: path.stat().st_size for path in files})
    if headers.beside < 0:
        raise CheckpointError(f"{foreign.path} stores tensors that share their bytes; save it anew")
    return headers


def _tensors(path: Path) -> Iterator[Stored]:
    if path.suffix == ".safetensors":
        for name, span in read_header(path).items():
            yield Stored(name, span.dtype, span.shape, span.end - span.start)
    elif path.suffix in PICKLED:
        yield from _pickled(path)
    else:
        yield from _gguf(path)


def open_gguf(path: Path) -> Any:
    """Open a GGUF file with its owner's reader, which maps it.  Raises CheckpointError."""
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # a damaged header can fail anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as GGUF: {telling_line(error)}") from error


def _gguf(path: Path) -> Iterator[Stored]:
    for tensor in open_gguf(path).tensors:
        shape = tuple(int(length) for length in reversed(tensor.shape.tolist()))
        yield Stored(tensor.name, tensor.tensor_type.name, shape, int(tensor.n_bytes))


def _pickled(path: Path) -> Iterator[Stored]:
    """Yield the tensors of a file that PyTorch pickled, without running code of it.

    A storage that several tensors share counts once, for the first of them.
    """
    import torch

    mapped = zipfile.is_zipfile(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone: {telling_line(error)}; save it as safetensors"
        ) from error
    seen: set[int] = set()
    for name, tensor, bits in _leaves("", state):
        memory = tensor.untyped_storage().data_ptr()
        if memory not in seen or not tensor.numel():
            kind = str(tensor.dtype).removeprefix("torch.")
            shape = tuple(tensor.shape)
            size = math.prod(shape) * tensor.itemsize
            yield Stored(name, SHORT.get(kind, kind), shape, size, bits)
        seen.add(memory)


def _leaves(
    name: str, value: Any, bits: float | None = None
) -> Iterator[tuple[str, Tensor, float | None]]:
    """Yield dotted name and tensor of nested dicts, and the `nbits` beside it."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value, bits
    elif isinstance(value, dict):
        stated = value.get("nbits")
        bits = float(stated) if isinstance(stated, int | float) else None
        for key, own in value.items():
            yield from _leaves(f"{name}.{key}".strip("."), own, bits)


SHORT = {
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{"bfloat16": "BF16", "uint8": "U8", "bool": "BOOL"},
}
