"""What a run in progress has quantized, for the same command to go on from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from claq_exp.checkpoint.files import read_json, sync_folder, write_json
from claq_exp.checkpoint.tensor_file import write_tensors
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.errors import CheckpointError
from claq_exp.payload import read_layout
from claq_exp.sources.cache import sha256_of

STATE_FILE = "state.json"
STATE_VERSION = 2
OVER = "set resume=never to start over"


@dataclass(frozen=True)
class _Part:
    """A file of finished linears: of which block, and what it must hash to."""

    block: int
    name: str
    sha256: str


class BlockStore:
    """Packed weights and reports of finished linears, and the activations that enter a block.

    `state.json` alone says what is finished: it is replaced after the files that it names are on
    disk, and a file whose sha256 differs is never used.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        """Name a store.  identity: everything that must be the same to go on from it."""
        self._folder = folder
        self._identity = dict(identity)
        self._blocks = 0
        self._parts: list[_Part] = []
        self._activations: dict[str, Any] | None = None

    @property
    def blocks(self) -> int:
        """Number of finished blocks."""
        return self._blocks

    def open(self, on_damage: Callable[[str], None] | None = None) -> None:
        """Read what is there.

        on_damage: told of a file that is missing or is not what was written; blocks from that one
        on count as not finished.  Raises CheckpointError when the store belongs to another
        experiment or its state is damaged, and for any damage without `on_damage`.
        """
        path = self._folder / STATE_FILE
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            return
        try:
            state = read_json(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {OVER}") from error
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"{path} has version {state.get('version')}, this release reads {STATE_VERSION}; "
                f"{OVER}"
            )
        self._check_identity(path, state.get("identity"))
        try:
            self._blocks = int(state["blocks"])
            self._parts = [_Part(p["block"], p["name"], p["sha256"]) for p in state["parts"]]
            self._activations = state["activations"]
            self._check_form()
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}; {OVER}") from error
        self._drop_damaged(on_damage)

    def follower(self) -> BlockStore:
        """Return the same store for another process, which reads and writes nothing."""
        store = _Follower(self._folder, self._identity)
        store._blocks, store._parts = self._blocks, list(self._parts)
        store._activations = self._activations
        return store

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(
        self, block: int, packed: Mapping[str, PackedWeight], report: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add finished linears of the block at hand.

        packed: name of each linear -> packed weight.  report: its rows of layers.csv.
        """
        number = sum(part.block == block for part in self._parts)
        tensors = {
            f"{name}.{suffix}": tensor
            for name, weight in packed.items()
            for suffix, tensor in weight.tensors.items()
        }
        layouts = {name: weight.layout.to_json() for name, weight in packed.items()}
        facts = {
            "layouts": json.dumps(layouts),
            "report": json.dumps(list(report), allow_nan=False),
        }
        name = f"block_{block:04d}_{number:02d}.safetensors"
        digest = self._write(
            name, lambda path: write_tensors(path, tensors, tensors.items(), facts)
        )
        self._publish(self._blocks, [*self._parts, _Part(block, name, digest)], self._activations)

    def begin_block(
        self, index: int, activations: Iterable[Tensor], like: Mapping[str, Tensor]
    ) -> None:
        """Have `index` blocks finished, and keep what enters the next, batch by batch.

        like: batch number -> a tensor of its shape and type, on any device.
        """
        name = _activations_name(index)
        numbered = ((str(batch), tensor) for batch, tensor in enumerate(activations))
        digest = self._write(name, lambda path: write_tensors(path, like, numbered))
        previous = self._activations
        entering = {"block": index, "name": name, "sha256": digest}
        self._publish(index, self._parts, entering)
        if previous and previous["name"] != name:
            (self._folder / previous["name"]).unlink(missing_ok=True)

    def packed(self, block: int | None = None) -> dict[str, PackedWeight]:
        """Return name -> packed weight of all finished linears, or those of one block.

        Tensors are read from their files when they are asked for.
        """
        found: dict[str, PackedWeight] = {}
        for part in self._parts:
            if block is None or part.block == block:
                path = self._folder / part.name
                for name, data in json.loads(_facts(path)["layouts"]).items():
                    layout = read_layout(data)
                    tensors = _FileTensors(path, f"{name}.", tuple(layout.stored_tensors()))
                    found[name] = PackedWeight(layout, tensors)
        return found

    def report(self) -> list[dict[str, Any]]:
        """Return the report rows of all finished linears."""
        facts = (_facts(self._folder / part.name) for part in self._parts)
        return [row for found in facts for row in json.loads(found["report"])]

    def activations(self) -> Sequence[Tensor] | None:
        """Return the hidden states that enter the block at hand, read batch by batch; or None."""
        if self._activations is None:
            return None
        return _Batches(self._folder / self._activations["name"])

    def _check_identity(self, path: Path, identity: Any) -> None:
        stored = identity if isinstance(identity, dict) else {}
        for key in sorted(self._identity.keys() | stored.keys()):
            there, here = stored.get(key), self._identity.get(key)
            if there != here:
                raise CheckpointError(f"{path} has {key} {there}, this run {here}; {OVER}")

    def _check_form(self) -> None:
        names = [part.name for part in self._parts]
        if self._activations is not None:
            names += [self._activations["name"], self._activations["sha256"]]
        blocks = [part.block for part in self._parts]
        if any(type(name) is not str or Path(name).name != name or name == ".." for name in names):
            raise ValueError("it names files outside of its folder")
        if blocks != sorted(blocks) or not 0 <= self._blocks <= len(set(blocks)):
            raise ValueError(
                f"{self._blocks} finished blocks do not fit parts of {sorted(set(blocks))}"
            )

    def _drop_damaged(self, on_damage: Callable[[str], None] | None) -> None:
        for number, part in enumerate(self._parts):
            if self._damaged(part.name, part.sha256, on_damage):
                self._parts = self._parts[:number]
                self._blocks = min(self._blocks, part.block)
                break
        entering = self._activations
        if entering is not None and (
            entering.get("block") != self._blocks
            or self._damaged(entering["name"], entering["sha256"], on_damage)
        ):
            self._activations = None
        if self._activations is None:
            self._blocks = 0  # what enters the next block is computed through the finished ones

    def _damaged(self, name: str, digest: str, on_damage: Callable[[str], None] | None) -> bool:
        path = self._folder / name
        if path.is_file() and sha256_of(path) == digest:
            return False
        message = f"{path} is missing or not the file that was written"
        if on_damage is None:
            raise CheckpointError(f"{message}; {OVER}")
        on_damage(message)
        return True

    def _write(self, name: str, write: Callable[[Path], None]) -> str:
        """Write a file beside its place, sync it, rename it; return its sha256."""
        path = self._folder / name
        temporary = path.with_name(f".{name}")
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        digest = sha256_of(temporary)
        temporary.replace(path)
        sync_folder(self._folder)
        return digest

    def _publish(self, blocks: int, parts: list[_Part], activations: dict[str, Any] | None) -> None:
        state = {
            "version": STATE_VERSION,
            "identity": self._identity,
            "blocks": blocks,
            "parts": [vars(part) for part in parts],
            "activations": activations,
        }
        write_json(self._folder / STATE_FILE, state)
        self._blocks, self._parts, self._activations = blocks, parts, activations


class _Follower(BlockStore):
    """A store that another process writes, in step with this one."""

    def add(
        self, block: int, packed: Mapping[str, PackedWeight], report: Sequence[Mapping[str, Any]]
    ) -> None:
        """Leave it to the process that writes."""

    def begin_block(
        self, index: int, activations: Iterable[Tensor], like: Mapping[str, Tensor]
    ) -> None:
        """Have `activations` made, for the process that writes."""
        for _ in activations:
            pass
        self._blocks, self._activations = index, {"name": _activations_name(index)}


class _FileTensors(Mapping[str, Tensor]):
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


class _Batches(Sequence[Tensor]):
    """The batches of a file of activations, mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._count = len(list(file.keys()))

    def __getitem__(self, batch: Any) -> Any:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(str(range(self._count)[batch]))

    def __len__(self) -> int:
        return self._count


def _activations_name(index: int) -> str:
    return f"activations_{index:04d}.safetensors"


def _facts(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
