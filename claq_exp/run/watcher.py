"""Who follows the work on a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Watcher:
    """Who follows a quantization.

    event: called with ("transform", what moved in a block), ("layer", report row), ("tune", what
    was trained of a block), ("block", seconds by kind of work) and ("stage", the same of the ends).
    share: called with (share of all work just done, where).
    stopping: asked after each group of linears whether to stop there.
    """

    event: Callable[[str, dict[str, Any]], None] = lambda _name, _data: None
    share: Callable[[float, str], None] = lambda _share, _where: None
    stopping: Callable[[], bool] = lambda: False


UNWATCHED = Watcher()
