"""Which runs of several seeds are one row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from claq_exp.errors import ConfigError
from claq_exp.reporting.collect import Run
from claq_exp.reporting.settings import check_seeds_only, seedless

TOGETHER = "Runs of seeds= are one row; --by seed shows each."


def group_runs(runs: Sequence[Run], *, merge: bool, apart: bool = False) -> list[list[Run]]:
    """Return the runs of each row.

    merge: all runs that differ in seeds only are one row.  Else those are that `seeds=` has run,
    unless the rows show seeds (apart), or the same seed is there twice.
    Raises ConfigError where `merge` cannot be done.
    """
    found: dict[Any, list[Run]] = {}
    for place, run in enumerate(runs):
        joined = merge or (run.together and not apart)
        found.setdefault((None, seedless(run)) if joined else (place, ()), []).append(run)
    groups = []
    for group in found.values():
        try:
            check_seeds_only(group, "all settings", "leave --seeds out")
        except ConfigError:
            if merge:
                raise
            groups += [[run] for run in group]
        else:
            groups.append(group)
    return groups
