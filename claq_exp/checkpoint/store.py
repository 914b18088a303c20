"""Finished blocks of a run in progress, for the same command to go on from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from claq_exp.checkpoint.files import read_json, save_tensors, write_json
from claq_exp.checkpoint.writer import PackedWeight
from claq_exp.errors import CheckpointError
from claq_exp.quantize.layout import WeightLayout
from claq_exp.sources.cache import sha256_of

STATE_FILE = "state.json"
STATE_VERSION = 1


class BlockStore:
    """Packed weights and reports of finished blocks, and the activations that enter the next block.

    `state.json` alone says what is finished: it is replaced after the files that it names are on
    disk, and a file whose sha256 differs is refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder
        self._state: dict[str, Any] = {
            "version": STATE_VERSION,
            "identity": identity,
            "blocks": [],
            "activations": None,
        }

    def open(self) -> int:
        """Read what is there and return the number of finished blocks.

        Raises CheckpointError when the store belongs to another experiment or is damaged.
        """
        path = self._folder / STATE_FILE
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            return 0
        state = read_json(path)
        for key in ("version", "identity"):
            if state.get(key) != self._state[key]:
                raise CheckpointError(
                    f"{path} has {key} {state.get(key)}, this run {self._state[key]}; set "
                    "resume=never to start over"
                )
        if not isinstance(state.get("blocks"), list) or "activations" not in state:
            raise CheckpointError(f"{path} is incomplete; set resume=never to start over")
        self._state = state
        return len(state["blocks"])

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def save_block(
        self,
        packed: dict[str, PackedWeight],
        report: list[dict[str, Any]],
        activations: list[Tensor],
    ) -> None:
        """Add a finished block.

        packed: name of each linear -> packed weight.  report: its rows of layers.csv.
        activations: what enters the next block, batch by batch.
        """
        index = len(self._state["blocks"])
        tensors = {
            f"{name}.{suffix}": tensor.contiguous()
            for name, weight in packed.items()
            for suffix, tensor in weight.tensors.items()
        }
        block = {
            "file": self._write(f"block_{index:04d}.safetensors", tensors),
            "layouts": {name: weight.layout.to_json() for name, weight in packed.items()},
            "report": report,
        }
        entering = {
            str(batch): tensor.cpu().contiguous() for batch, tensor in enumerate(activations)
        }
        newest = self._write(f"activations_{index + 1:04d}.safetensors", entering)
        previous = self._state["activations"]
        blocks = [*self._state["blocks"], block]
        self._state = {**self._state, "blocks": blocks, "activations": newest}
        write_json(self._folder / STATE_FILE, self._state)
        if previous:
            (self._folder / previous["name"]).unlink(missing_ok=True)

    def load_blocks(self) -> tuple[dict[str, PackedWeight], list[dict[str, Any]]]:
        """Return the packed weights and report rows of all finished blocks."""
        packed: dict[str, PackedWeight] = {}
        report: list[dict[str, Any]] = []
        for block in self._state["blocks"]:
            tensors = self._read(block["file"])
            for name, data in block["layouts"].items():
                layout = WeightLayout.from_json(data)
                suffixes = layout.stored_tensors()
                stored = {suffix: tensors[f"{name}.{suffix}"] for suffix in suffixes}
                packed[name] = PackedWeight(layout, stored)
            report.extend(block["report"])
        return packed, report

    def load_activations(self) -> list[Tensor]:
        """Return the hidden states that enter the next block, batch by batch."""
        tensors = self._read(self._state["activations"])
        return [tensors[str(batch)] for batch in range(len(tensors))]

    def _write(self, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        path = self._folder / name
        temporary = path.with_name(f".{name}")
        save_tensors(tensors, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        return {"name": name, "sha256": sha256_of(path)}

    def _read(self, entry: dict[str, str]) -> dict[str, Tensor]:
        path = self._folder / Path(entry["name"]).name
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} is missing or not the file that was written; set resume=never to start "
                "over"
            )
        return load_file(path)
