"""What a run in progress has made, for the same command to go on from.

A part of the store is what one stage of a run has published of one unit (a window of blocks, or the
whole model): packed matrices, other tensors that changed, rows of reports.  Any unit may be
published again, by its own stage or by a later one: the newest tensor of a name counts, and so does
the newest row.  Beside the parts there are the hidden states that enter the block at hand, of each
stream, and at most one snapshot of an optimizer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from claq_exp.checkpoint.store_state import Contents, Part, State, StoreFile, read_contents
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.errors import CheckpointError
from claq_exp.payload import read_layout
from claq_exp.sources.cache import sha256_of
from claq_exp.system.files import read_json, sync_folder, write_json
from claq_exp.tensor_files.tensor_file import Batches, FileTensors, write_tensors

STATE_FILE = "state.json"
STATE_VERSION = 3
OVER = "set resume=never to start over"
WORD = re.compile(r"[a-z_]+")  # of a stage or a stream, which names files
DENSE = "dense."  # before the name of a tensor that is no part of a packed matrix


class BlockStore:
    """Parts, hidden states and a snapshot in a folder; see the module.

    `state.json` alone says what counts: it is replaced after the files that it names are on disk.
    No file that it names is written again, and a file whose sha256 differs is never used.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        """Name a store.  identity: everything that must be the same to go on from it."""
        self._folder = folder
        self._identity = dict(identity)
        self._state = State()
        self._next: dict[str, StoreFile] = {}  # hidden states that leave the block at hand

    @property
    def blocks(self) -> int:
        """Number of finished blocks."""
        return self._state.blocks

    def open(self, on_damage: Callable[[str], None] | None = None) -> None:
        """Read what is there.

        on_damage: told of a file that is missing or is not what was written, and of a store of an
        earlier release, which is removed.  Parts from the damaged one on do not count any more.
        Raises CheckpointError when the store belongs to another experiment or its state is damaged,
        and for any damage without `on_damage`.
        """
        self._next = {}
        path = self._folder / STATE_FILE
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            return
        try:
            data = read_json(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {OVER}") from error
        version = data.get("version")
        if version in range(1, STATE_VERSION) and on_damage is not None:
            self._check_identity(path, data.get("identity"))
            self._start_over(on_damage, f"{path} is of an earlier release (store {version})")
            return
        if version != STATE_VERSION:
            raise CheckpointError(
                f"{path} has version {version}, this release reads {STATE_VERSION}; {OVER}"
            )
        self._check_identity(path, data.get("identity"))
        try:
            found = State.of(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}; {OVER}") from error
        self._state = self._undamaged(found, on_damage)
        if self._state.files() != found.files():
            self._publish(self._state)

    def follower(self) -> BlockStore:
        """Return the same store for another process, which writes nothing."""
        store = _Follower(self._folder, self._identity)
        store._state = self._state
        return store

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._state, self._next = State(), {}

    def add(
        self,
        stage: str,
        unit: int | None,
        *,
        packed: Mapping[str, PackedWeight] | None = None,
        dense: Mapping[str, Tensor] | None = None,
        report: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Publish what a stage has made of a unit, or a part of it.

        packed: name of a matrix -> packed weight.  dense: name -> any other tensor of the model
        that changed.  report: rows, each with the `name` of what it is about.
        """
        packed, dense = packed or {}, dense or {}
        tensors = {f"{DENSE}{name}": tensor for name, tensor in dense.items()}
        for name, weight in packed.items():
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in weight.tensors.items()}
        layouts = {name: weight.layout.to_json() for name, weight in packed.items()}
        contents = Contents(layouts, tuple(dense), tuple(report))
        file = self._write_tensors(_numbered(stage, unit), tensors, contents)
        part = Part(stage, unit, file, contents)
        parts = (*self._left(stage, unit, contents), part)
        snapshot = self._state.snapshot
        if snapshot is not None and (snapshot.stage, snapshot.unit) == (stage, unit):
            snapshot = None
        self._publish(State(self.blocks, parts, self._state.hidden, snapshot))

    def keep_hidden(
        self, stream: str, index: int, hidden: Iterable[Tensor], like: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        """Write what enters block `index`, batch by batch; it counts from `begin_block` on.

        like: batch number -> a tensor of its shape and type, on any device.  Returns the batches,
        which are read from the file as they are asked for.
        """
        name = self._hidden_name(stream, index)
        numbered = ((str(batch), tensor) for batch, tensor in enumerate(hidden))
        digest = self._write(name, lambda path: write_tensors(path, like, numbered))
        self._next[stream] = StoreFile(name, digest)
        return Batches(self._folder / name)

    def begin_block(self, index: int) -> None:
        """Have `index` blocks finished; what was kept of the streams enters the next."""
        entering, self._next = self._next, {}
        self._publish(State(index, self._state.parts, entering, self._state.snapshot))

    def hidden(self, stream: str) -> Sequence[Tensor] | None:
        """Return what enters the block at hand, read batch by batch; None where nothing is kept."""
        file = self._state.hidden.get(stream)
        return None if file is None else Batches(self._folder / file.name)

    def has(self, stage: str, unit: int | None) -> bool:
        """Tell whether a stage has published anything of a unit."""
        return any((part.stage, part.unit) == (stage, unit) for part in self._state.parts)

    def packed(self, within: str = "") -> dict[str, PackedWeight]:
        """Return name -> packed weight, of names that begin with `within`.

        Tensors are read from their files when they are asked for.
        """
        found: dict[str, PackedWeight] = {}
        for part in self._state.parts:
            for name, data in part.contents.layouts.items():
                if name.startswith(within):
                    layout = read_layout(data)
                    names = tuple(layout.stored_tensors())
                    tensors = FileTensors(self._folder / part.file.name, f"{name}.", names)
                    found[name] = PackedWeight(layout, tensors)
        return found

    def dense(self) -> dict[str, Tensor]:
        """Return name -> tensor of all that changed beside packed matrices."""
        places = {name: part for part in self._state.parts for name in part.contents.dense}
        return {
            name: FileTensors(self._folder / part.file.name, DENSE, (name,))[name]
            for name, part in places.items()
        }

    def report(self, stage: str) -> list[dict[str, Any]]:
        """Return the rows of a stage, one for each name."""
        parts = (part for part in self._state.parts if part.stage == stage)
        return list({row["name"]: dict(row) for p in parts for row in p.contents.report}.values())

    def save_snapshot(self, stage: str, unit: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Keep how far a stage has come with a unit, in place of the snapshot before.

        It is gone once the stage has published the unit.
        """
        file = self._write_tensors(_numbered(f"snapshot_{stage}", unit), tensors, Contents())
        state = self._state
        snapshot = Part(stage, unit, file)
        self._publish(State(state.blocks, state.parts, state.hidden, snapshot))

    def snapshot(self, stage: str, unit: int | None) -> dict[str, Tensor] | None:
        """Return what a stage has kept of a unit that it has begun, or None."""
        found = self._state.snapshot
        if found is None or (found.stage, found.unit) != (stage, unit):
            return None
        with safe_open(self._folder / found.file.name, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _check_identity(self, path: Path, identity: Any) -> None:
        stored = identity if isinstance(identity, dict) else {}
        for key in sorted(self._identity.keys() | stored.keys()):
            there, here = stored.get(key), self._identity.get(key)
            if there != here:
                raise CheckpointError(f"{path} has {key} {there}, this run {here}; {OVER}")

    def _start_over(self, on_damage: Callable[[str], None], why: str) -> None:
        self.clear()
        self._folder.mkdir(parents=True)
        on_damage(why)

    def _undamaged(self, state: State, on_damage: Callable[[str], None] | None) -> State:
        """Return what can be used of a state, with the contents of its parts."""
        kept: list[Part] = []
        for part in state.parts:
            if self._damaged(part.file, on_damage):
                break
            contents = read_contents(self._folder / part.file.name)
            kept.append(Part(part.stage, part.unit, part.file, contents))
        lost = [part.unit for part in state.parts[len(kept) :] if part.unit is not None]
        whole = all(unit >= state.blocks for unit in lost) and not any(
            self._damaged(file, on_damage) for file in state.hidden.values()
        )
        # without what enters the next block, it is computed through the finished ones
        blocks, hidden = (state.blocks, state.hidden) if whole and state.hidden else (0, {})
        snapshot = state.snapshot
        if snapshot is not None and self._damaged(snapshot.file, on_damage):
            snapshot = None
        return State(blocks, tuple(kept), hidden, snapshot)

    def _damaged(self, file: StoreFile, on_damage: Callable[[str], None] | None) -> bool:
        path = self._folder / file.name
        if path.is_file() and sha256_of(path) == file.sha256:
            return False
        message = f"{path} is missing or not the file that was written"
        if on_damage is None:
            raise CheckpointError(f"{message}; {OVER}")
        on_damage(message)
        return True

    def _left(self, stage: str, unit: int | None, new: Contents) -> list[Part]:
        """Return the parts of which something counts beside a new one of a stage and unit.

        What another stage has published stays: it is what is gone back to where the new part is
        damaged.
        """
        keys, left = new.keys(), []
        for part in reversed(self._state.parts):
            own = (part.stage, part.unit) == (stage, unit)
            if own and part.contents.keys() <= keys:
                continue
            keys |= part.contents.keys() if own else set()
            left.append(part)
        return left[::-1]

    def _hidden_name(self, stream: str, index: int) -> str:
        name = f"{stream}_{index:04d}.safetensors"
        counts = name in {file.name for file in self._state.hidden.values()}
        return f"{stream}_{index:04d}_again.safetensors" if counts else name

    def _write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], contents: Contents
    ) -> StoreFile:
        facts = {
            "layouts": json.dumps(contents.layouts),
            "dense": json.dumps(contents.dense),
            "report": json.dumps(contents.report, allow_nan=False),
        }
        taken = self._state.files()
        names = (f"{name}_{number:02d}.safetensors" for number in range(len(taken) + 1))
        free = next(name for name in names if name not in taken)
        digest = self._write(
            free, lambda path: write_tensors(path, tensors, tensors.items(), facts)
        )
        return StoreFile(free, digest)

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

    def _publish(self, state: State) -> None:
        """Have a state count, and remove what does not."""
        about = {"version": STATE_VERSION, "identity": self._identity}
        write_json(self._folder / STATE_FILE, {**about, **state.as_json()})
        self._state = state
        kept = state.files() | {file.name for file in self._next.values()}
        for path in self._folder.glob("*.safetensors"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


class _Follower(BlockStore):
    """A store that another process writes, in step with this one."""

    def add(
        self,
        stage: str,
        unit: int | None,
        *,
        packed: Mapping[str, PackedWeight] | None = None,
        dense: Mapping[str, Tensor] | None = None,
        report: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Leave it to the process that writes."""

    def keep_hidden(
        self, stream: str, index: int, hidden: Iterable[Tensor], like: Mapping[str, Tensor]
    ) -> Sequence[Tensor]:
        """Have `hidden` made, for the process that writes."""
        for _ in hidden:
            pass
        self._next[stream] = StoreFile(self._hidden_name(stream, index), "")
        return Batches(self._folder / self._next[stream].name)

    def save_snapshot(self, stage: str, unit: int | None, tensors: Mapping[str, Tensor]) -> None:
        """Leave it to the process that writes."""

    def _publish(self, state: State) -> None:
        self._state = state


def _numbered(stage: str, unit: int | None) -> str:
    """Return how the name of a part's file begins."""
    if not WORD.fullmatch(stage):
        raise ValueError(f"a stage is called by small letters, not '{stage}'")
    return f"{stage}_model" if unit is None else f"{stage}_{unit:04d}"
