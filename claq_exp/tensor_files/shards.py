"""The weights of a checkpoint: one safetensors file, or several with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.system.files import json_bytes, parse_json, read_json, write_json
from claq_exp.tensor_files.tensor_file import header_bytes, write_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # tensors of one file, as in transformers
HEADER_LIMIT = 100_000_000  # bytes of a header, as in safetensors
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies in its file: bytes `start` to `end`, counted from the file's first."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Unit:
    """Tensors that stay in one file.

    tensors: by name; on the meta device where `read` brings them.  dtype: what floating ones are
    stored in; None: their own.
    """

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype | None = None
    read: Callable[[], Mapping[str, Tensor]] | None = None

    @property
    def bytes(self) -> int:
        """What the tensors take in a file."""
        return sum(t.numel() * t.itemsize for t in self.announced().values())

    def announced(self) -> dict[str, Tensor]:
        """Return tensors of the stored shapes and types, without content."""
        return {
            name: torch.empty(tensor.shape, dtype=self._stored(tensor), device="meta")
            for name, tensor in self.tensors.items()
        }

    def load(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor as they are stored, on the CPU."""
        tensors = self.tensors if self.read is None else self.read()
        for name, tensor in tensors.items():
            stored = tensor.detach().to("cpu", self._stored(self.tensors[name]))
            if stored.dtype != tensor.dtype and not torch.isfinite(stored).all():
                raise CheckpointError(f"{name} holds a value that {stored.dtype} cannot hold")
            yield name, stored

    def _stored(self, tensor: Tensor) -> torch.dtype:
        if self.dtype is None or not tensor.is_floating_point():
            return tensor.dtype
        return self.dtype


def read_header(path: Path) -> dict[str, TensorSpan]:
    """Return name -> span of every tensor of a safetensors file, in the order of the bytes.

    Reads the header alone.  Raises CheckpointError unless the spans cover the file without a gap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        spans = {name: _span(name, entry, 8 + length) for name, entry in header.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    spans = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].end)))
    reached = 8 + length
    for name, span in spans.items():
        if span.start != reached:
            raise CheckpointError(f"{path}: {name} starts at byte {span.start}, not at {reached}")
        reached = span.end
    if reached != size:
        raise CheckpointError(f"{path} has {size} bytes, its header describes {reached}")
    return spans


def _span(name: str, entry: Any, start: int) -> TensorSpan:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"'{name}' has a shape or offsets that are no counts")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"'{name}' has the unknown dtype {dtype}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != ITEM_BYTES[dtype] * math.prod(shape):
        raise ValueError(f"the offsets of '{name}' do not fit its shape {shape}")
    return TensorSpan(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def read_spans(folder: Path) -> dict[str, dict[str, TensorSpan]]:
    """Return file name -> name -> span for all weights of a checkpoint.

    Raises CheckpointError when files and index do not agree.
    """
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        return {WEIGHTS_FILE: read_header(folder / WEIGHTS_FILE)}
    if (folder / WEIGHTS_FILE).exists():
        raise CheckpointError(
            f"{folder} has both {WEIGHTS_FILE} and {INDEX_FILE}; one is left over"
        )
    index = read_json(index_path)
    places = index.get("weight_map")
    if set(index) != {"metadata", "weight_map"} or not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index_path} must hold metadata and weight_map, and nothing else")
    names = set(places.values()) if all(isinstance(n, str) for n in places.values()) else set()
    expected = {shard_name(number, len(names)) for number in range(1, len(names) + 1)}
    if names != expected or not names:
        raise CheckpointError(f"{index_path} names other files than its shards, 1 to their number")
    spans = {name: read_header(folder / name) for name in sorted(names)}
    found = {tensor: name for name, shard in spans.items() for tensor in shard}
    if found != places or sum(map(len, spans.values())) != len(places):
        raise CheckpointError(f"{index_path} does not agree with the headers of its shards")
    if index["metadata"] != {"total_size": _total(spans.values())}:
        raise CheckpointError(f"{index_path}: metadata must be the total_size of all tensors")
    return spans


def shard_name(number: int, shards: int) -> str:
    """Return the name of one of several files, as transformers counts them from 1."""
    return f"model-{number:05d}-of-{shards:05d}.safetensors"


@contextmanager
def open_tensors(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """Yield a function from a tensor's name to the tensor; files are mapped, not read at once.

    The function raises CheckpointError for a name that is not there.
    """
    places = {tensor: name for name, shard in read_spans(folder).items() for tensor in shard}
    with ExitStack() as stack:
        opened: dict[str, Any] = {}

        def get(tensor: str) -> Tensor:
            if tensor not in places:
                raise CheckpointError(f"{folder} lacks the tensor {tensor}")
            path = folder / places[tensor]
            try:
                if path.name not in opened:
                    opened[path.name] = stack.enter_context(safe_open(path, framework="pt"))
                return opened[path.name].get_tensor(tensor)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error

        yield get


def save_units(folder: Path, units: Iterable[Unit], shard_bytes: int) -> None:
    """Write units in their order: into one file, or several of at most `shard_bytes` of tensors.

    A unit that is larger has a file of its own.  No more than one unit's tensors are held at once.
    """
    shards = _shards(units, shard_bytes)
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_FILE if len(shards) == 1 else shard_name(number, len(shards))
        write_tensors(folder / name, _announced(shard), (t for unit in shard for t in unit.load()))
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, _index(shards))


def described_bytes(units: Iterable[Unit], shard_bytes: int) -> int:
    """Return the bytes that `save_units` would write beside the tensors: headers and index."""
    shards = _shards(units, shard_bytes)
    headers = sum(header_bytes(_announced(shard)) for shard in shards)
    return headers + (json_bytes(_index(shards)) if len(shards) > 1 else 0)


def _shards(units: Iterable[Unit], shard_bytes: int) -> list[list[Unit]]:
    shards: list[list[Unit]] = [[]]
    room = shard_bytes
    for unit in units:
        if unit.bytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(unit)
        room -= unit.bytes
    return shards


def _announced(units: list[Unit]) -> dict[str, Tensor]:
    return {name: tensor for unit in units for name, tensor in unit.announced().items()}


def _index(shards: list[list[Unit]]) -> dict[str, Any]:
    places = {
        tensor: shard_name(number, len(shards))
        for number, shard in enumerate(shards, start=1)
        for unit in shard
        for tensor in unit.tensors
    }
    total = sum(unit.bytes for shard in shards for unit in shard)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def index_bytes(names: Iterable[str], total: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Estimate the bytes of the index of `total` bytes of tensors; 0 where one file is enough."""
    if total <= shard_bytes:
        return 0
    lines = [len(json.dumps(name)) + len(shard_name(1, 1)) + 10 for name in names]
    return sum(lines) + 100


def _total(shards: Iterable[Mapping[str, TensorSpan]]) -> int:
    return sum(span.end - span.start for shard in shards for span in shard.values())
