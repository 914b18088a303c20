"""What is finished and not in the store yet."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import PackedWeight

PUBLISH_SECONDS = 5.0  # of solving that a kill may cost, where a group does not take longer


@dataclass
class Pending:
    """Finished linears that are not in the store yet.  stage, block: that they are published as."""

    store: BlockStore
    stage: str
    block: int
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    report: list[dict[str, Any]] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def add(self, packed: PackedWeight, row: dict[str, Any]) -> None:
        """Take a linear.  row: of the report."""
        self.packed[row["name"]] = packed
        self.report.append(row)

    def publish(self, *, now: bool) -> None:
        """Bring them into the store, now or when it is time to."""
        if self.packed and (now or time.monotonic() - self.since > PUBLISH_SECONDS):
            self.store.add(self.stage, self.block, packed=self.packed, report=self.report)
            self.packed, self.report, self.since = {}, [], time.monotonic()
