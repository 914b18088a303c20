"""Any history of a store, with kills at any of its writes, leaves the newest whole state."""

from __future__ import annotations

import copy
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_block_store import packed as packed_block
from torch import Tensor

from claq_exp.checkpoint import store
from claq_exp.checkpoint.store import BlockStore
from claq_exp.system import files
from claq_exp.tensor_files import tensor_file

STAGES = ("transform", "quantize", "tune")
UNITS = (0, 1, 2, None)
NAMES = ("a", "b", "c")
MATRICES = [packed_block(index) for index in range(2)]  # of two stages' making
STREAMS = ("student", "teacher")


class Kill(BaseException):
    """The process ends where this is raised."""


@dataclass
class Kills:
    """Ends the process at a write, as many of them from now: before it, or halfway through it."""

    left: int = -1

    def strike(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Kill

    def around(self, patch: pytest.MonkeyPatch) -> None:
        """Have every operation that changes a disk be one that a kill can precede."""
        for owner, name in (
            (store.os, "fsync"),
            (store, "sync_folder"),
            (files, "sync_folder"),
            (Path, "replace"),
            (Path, "unlink"),
        ):
            self._precede(patch, owner, name)
        write = tensor_file.write_tensors

        def half(path: Path, *arguments: Any) -> None:
            write(path, *arguments)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            self.strike()
            path.write_bytes(whole)

        patch.setattr(store, "write_tensors", half)

    def _precede(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def struck(*arguments: Any, **options: Any) -> Any:
            self.strike()
            return original(*arguments, **options)

        patch.setattr(owner, name, struck)


@dataclass
class Expected:
    """What a store must hold."""

    blocks: int = 0
    units: set[tuple[str, int | None]] = field(default_factory=set)
    matrices: dict[str, int] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    rows: dict[tuple[str, str], float] = field(default_factory=dict)
    hidden: dict[str, float] = field(default_factory=dict)
    snapshot: tuple[str, int | None, float] | None = None

    def matches(self, found: BlockStore) -> bool:
        matrices = found.packed()
        dense = found.dense()
        return (
            found.blocks == self.blocks
            and all(found.has(s, u) == ((s, u) in self.units) for s in STAGES for u in UNITS)
            and matrices.keys() == self.matrices.keys()
            and all(same(matrices[name].tensors, which) for name, which in self.matrices.items())
            and {name: tensor.item() for name, tensor in dense.items()} == self.dense
            and {(s, row["name"]): row["value"] for s in STAGES for row in found.report(s)}
            == self.rows
            and all(self._stream(found, stream) for stream in STREAMS)
            and all(self._snapshot(found, s, u) for s in STAGES for u in UNITS)
        )

    def _stream(self, found: BlockStore, stream: str) -> bool:
        states = found.hidden(stream)
        if states is None:
            return stream not in self.hidden
        return [t.item() for t in states] == [self.hidden.get(stream)] * 2

    def _snapshot(self, found: BlockStore, stage: str, unit: int | None) -> bool:
        kept = found.snapshot(stage, unit)
        value = None if kept is None else (stage, unit, kept["step"].item())
        wanted = self.snapshot
        return value == (wanted if wanted and wanted[:2] == (stage, unit) else None)


def same(tensors: Any, which: int) -> bool:
    expected = next(iter(MATRICES[which].values())).tensors
    return all(torch.equal(tensors[suffix], tensor) for suffix, tensor in expected.items())


class Histories(RuleBasedStateMachine):
    """Publishes, kills and opens at random, and holds the store against `Expected`."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.kills = Kills()
        self.kills.around(self.patch)
        self.expected = Expected()
        self.value = 0.0

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self) -> None:
        self.open()

    @rule()
    def open(self) -> None:
        told: list[str] = []
        self.store = BlockStore(self.folder / "store", {"run": "run"})
        self.store.open(told.append)
        assert told == []  # what a kill left is no damage

    def do(self, kill: int, work: Any, after: Expected) -> None:
        """Do something that changes what is expected to `after`, or be killed within it."""
        self.kills.left = kill
        try:
            work()
        except Kill:
            self.open()
            assert self.expected.matches(self.store) or after.matches(self.store)
            if self.expected.matches(self.store):
                return
        self.kills.left = -1
        self.expected = after

    @rule(
        stage=st.sampled_from(STAGES),
        unit=st.sampled_from(UNITS),
        matrices=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 1)),
        dense=st.sets(st.sampled_from(NAMES)),
        rows=st.sets(st.sampled_from(NAMES)),
        kill=st.integers(-1, 12),
    )
    def publish(self, stage, unit, matrices, dense, rows, kill) -> None:
        self.value += 1
        after = copy.deepcopy(self.expected)
        after.units.add((stage, unit))
        after.matrices |= matrices
        after.dense |= dict.fromkeys(dense, self.value)
        after.rows |= {(stage, name): self.value for name in rows}
        if after.snapshot and after.snapshot[:2] == (stage, unit):
            after.snapshot = None
        self.do(
            kill,
            lambda: self.store.add(
                stage,
                unit,
                packed={name: next(iter(MATRICES[w].values())) for name, w in matrices.items()},
                dense={name: torch.tensor(self.value) for name in dense},
                report=[{"name": name, "value": self.value} for name in rows],
            ),
            after,
        )

    @rule(streams=st.sampled_from([STREAMS[:1], STREAMS]), kill=st.integers(-1, 20))
    def finish_a_block(self, streams, kill) -> None:
        units = {unit for _, unit in self.expected.units}
        index = self.expected.blocks + (self.expected.blocks in units)
        self.value += 1
        after = copy.deepcopy(self.expected)
        after.blocks, after.hidden = index, dict.fromkeys(streams, self.value)

        def work() -> None:
            like = {str(batch): torch.empty(1, device="meta") for batch in range(2)}
            for stream in streams:
                states: list[Tensor] = [torch.tensor([self.value])] * 2
                kept = self.store.keep_hidden(stream, index, states, like)
                assert [state.item() for state in kept] == [self.value] * 2
            self.store.begin_block(index)

        self.do(kill, work, after)

    @rule(stage=st.sampled_from(STAGES), unit=st.sampled_from(UNITS), kill=st.integers(-1, 12))
    def snap(self, stage, unit, kill) -> None:
        self.value += 1
        after = copy.deepcopy(self.expected)
        after.snapshot = (stage, unit, self.value)
        step = {"step": torch.tensor(self.value)}
        self.do(kill, lambda: self.store.save_snapshot(stage, unit, step), after)

    @invariant()
    def it_is_as_expected(self) -> None:
        if hasattr(self, "store"):
            assert self.expected.matches(self.store)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
