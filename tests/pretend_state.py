"""What the pretended device holds and has counted, see `pretend_device`."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import total_ordering
from pathlib import Path

import torch

NAME = "pretend"
PROJECT = Path(__file__).parents[1]
OWN = tuple(  # how the names of the files begin that pretend
    Path(__file__).with_name(name).as_posix() for name in (NAME, "processors")
)


@dataclass
class Traffic:
    """What went between host and device.  Each counter has the line of the project that asked."""

    uploads: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    bytes_up: int = 0
    bytes_down: int = 0

    def total(self, kind: str) -> int:
        """Return how many there were of uploads, downloads or waits."""
        return getattr(self, kind).total()


class State:
    """What the one pretended machine holds."""

    available = False
    allocated = 0
    peak = 0
    limit = 1 << 34
    watchers: list[Traffic] = []  # noqa: RUF012


class Allocation:
    """Memory of the device, as long as a tensor uses it."""

    def __init__(self, size: int) -> None:
        self.size = size
        if State.allocated + size > State.limit:
            self.size = 0
            raise torch.OutOfMemoryError(
                f"{NAME} out of memory. Tried to allocate {size} bytes, of which "
                f"{State.limit - State.allocated} are free"
            )
        State.allocated += size
        State.peak = max(State.peak, State.allocated)

    def __del__(self, state: type[State] = State) -> None:
        state.allocated -= self.size


@total_ordering
class Address:
    """Where a tensor lies in the device's memory: no number, for nothing on the CPU may read it."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __add__(self, count: int) -> Address:
        return Address(self._address + count)

    def __lt__(self, other: Address) -> bool:
        return self._address < other._address

    def __mod__(self, by: int) -> int:
        return self._address % by

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and other._address == self._address

    def __hash__(self) -> int:
        return hash(self._address)

    def __index__(self) -> int:
        raise RuntimeError(f"an address on {NAME} cannot be read by code that runs on the CPU")

    __int__ = __index__


def where() -> str:
    """Return the line of the project that is running."""
    own = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename.startswith(str(PROJECT)) and not frame.filename.startswith(OWN)
    ]
    if not own:
        return "?"
    return f"{Path(own[-1].filename).relative_to(PROJECT)}:{own[-1].lineno}"
