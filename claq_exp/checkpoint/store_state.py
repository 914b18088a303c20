"""What the parts of a store hold, and what its state.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from claq_exp.errors import CheckpointError


@dataclass(frozen=True)
class Contents:
    """What the header of a part says.

    layouts: name of a matrix -> its layout as JSON.  dense: names of other tensors.
    """

    layouts: Mapping[str, Any] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    report: tuple[Mapping[str, Any], ...] = ()

    def keys(self) -> set[tuple[str, str]]:
        """Return what a later part must hold so that nothing of this one counts any more."""
        rows = (row["name"] for row in self.report)
        kinds = {"packed": self.layouts, "dense": self.dense, "row": rows}
        return {(kind, name) for kind, names in kinds.items() for name in names}


@dataclass(frozen=True)
class StoreFile:
    """A file of the store, and what it must hash to."""

    name: str
    sha256: str

    @staticmethod
    def of(entry: Mapping[str, Any]) -> StoreFile:
        """Take it from state.json.  Raises ValueError for a name that leads elsewhere."""
        name, digest = entry["name"], entry["sha256"]
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise ValueError("it names files outside of its folder")
        return StoreFile(name, str(digest))


@dataclass(frozen=True)
class Part:
    """What a stage has published of a unit.

    unit: number of the first block of a window; None for the whole model.
    """

    stage: str
    unit: int | None
    file: StoreFile
    contents: Contents = Contents()

    @staticmethod
    def of(entry: Mapping[str, Any]) -> Part:
        """Take it from state.json, without its contents."""
        stage, unit = entry["stage"], entry["unit"]
        if not isinstance(stage, str) or not (unit is None or (type(unit) is int and unit >= 0)):
            raise ValueError(f"it has a part of {stage} {unit}")
        return Part(stage, unit, StoreFile.of(entry))

    def as_json(self) -> dict[str, Any]:
        """Return its entry in state.json."""
        return {"stage": self.stage, "unit": self.unit, **vars(self.file)}


@dataclass(frozen=True)
class State:
    """What state.json says.  hidden: stream -> what enters the block after the finished ones."""

    blocks: int = 0
    parts: tuple[Part, ...] = ()
    hidden: Mapping[str, StoreFile] = field(default_factory=dict)
    snapshot: Part | None = None

    @staticmethod
    def of(data: Mapping[str, Any]) -> State:
        """Take it from state.json.  Raises KeyError, TypeError or ValueError for another form."""
        blocks, snapshot = data["blocks"], data["snapshot"]
        parts = tuple(Part.of(entry) for entry in data["parts"])
        units = {part.unit for part in parts}
        if type(blocks) is not int or blocks < 0 or not units >= set(range(blocks)):
            raise ValueError(f"{blocks} finished blocks do not fit parts of {len(units)}")
        hidden = {stream: StoreFile.of(entry) for stream, entry in data["hidden"].items()}
        return State(blocks, parts, hidden, None if snapshot is None else Part.of(snapshot))

    def as_json(self) -> dict[str, Any]:
        """Return the content of state.json."""
        return {
            "blocks": self.blocks,
            "parts": [part.as_json() for part in self.parts],
            "hidden": {stream: vars(file) for stream, file in self.hidden.items()},
            "snapshot": None if self.snapshot is None else self.snapshot.as_json(),
        }

    def files(self) -> set[str]:
        """Return the names of all files that count."""
        parts = self.parts if self.snapshot is None else (*self.parts, self.snapshot)
        return {part.file.name for part in parts} | {file.name for file in self.hidden.values()}


def read_contents(path: Path) -> Contents:
    """Read the header of a part.  Raises CheckpointError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    layouts, dense, report = (json.loads(facts[key]) for key in ("layouts", "dense", "report"))
    return Contents(layouts, tuple(dense), tuple(report))
