"""Scores that were measured before, found by everything that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claq_exp.errors import CheckpointError
from claq_exp.system.files import read_json, write_json


@dataclass(frozen=True)
class ScoreStore:
    """A folder with one JSON file a score of one model, named by the hash of what it depends on.

    subject: everything of the model, its dtype, device and libraries that a score depends on; JSON
    data of content hashes, versions and settings, never of names or times.
    """

    folder: Path
    subject: Mapping[str, Any]

    def find(self, measure: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the score of a measure (JSON data of all that defines it), or None.

        A file that cannot be read, or is not what was written, or holds another subject or measure,
        counts as none.
        """
        path, key = self._place(measure)
        try:
            found = read_json(path)
        except CheckpointError:
            return None
        score = found.get("score")
        if found.get("key") != key or found.get("sha256") != _digest(score):
            return None
        return score

    def keep(self, measure: Mapping[str, Any], score: Mapping[str, Any]) -> None:
        """Write a score down, at once and whole, where there is room for it."""
        path, key = self._place(measure)
        with contextlib.suppress(OSError):  # what is not kept will be measured again
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = dict(score)
            write_json(path, {"key": key, "score": kept, "sha256": _digest(kept)})

    def _place(self, measure: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        key = json.loads(json.dumps({"subject": self.subject, "measure": measure}))
        return self.folder / f"{_digest(key)[:32]}.json", key


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
