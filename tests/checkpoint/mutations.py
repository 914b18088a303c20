"""Random damages of a checkpoint, and a program that loads what they leave.

    python mutations.py FOLDER OF CHECKPOINTS, WORKPLACE, ROUNDS

It writes a line of JSON for each damage and each way to load it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import damages
import torch

from claq_exp.checkpoint.manifest import write_manifest
from claq_exp.errors import ClaqError
from claq_exp.runtime.load import load_checkpoint
from claq_exp.tensor_files.shards import read_spans

TOKENS = torch.arange(12).reshape(1, 12)
KERNELS = ("dense", "reference")


def some_file(folder: Path, dice: random.Random, pattern: str = "*") -> Path:
    return dice.choice(sorted(folder.glob(pattern)))


def change_bytes(damage: str, folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    path.write_bytes(damages.BYTES[damage](path.read_bytes(), dice))


def flip_in_header(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice, "*.safetensors")
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(damages.flip(content[:header], dice) + content[header:])


def remove(folder: Path, dice: random.Random) -> None:
    some_file(folder, dice).unlink()


def swap_files(folder: Path, dice: random.Random) -> None:
    first, second = some_file(folder, dice), some_file(folder, dice)
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def swap_tensors(folder: Path, dice: random.Random) -> None:
    file = some_file(folder, dice, "*.safetensors")
    spans = list(read_spans(folder)[file.name].values())
    first = dice.choice(spans)
    alike = [span for span in spans if span.end - span.start == first.end - first.start]
    second = dice.choice(alike)
    content = bytearray(file.read_bytes())
    one, two = content[first.start : first.end], content[second.start : second.end]
    content[first.start : first.end], content[second.start : second.end] = two, one
    file.write_bytes(content)


def edit_json(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice, "*.json")
    data = json.loads(path.read_text())
    damages.edit_json(data, dice)
    path.write_text(json.dumps(data))


def edit_config(folder: Path, dice: random.Random) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data[dice.choice(sorted(data))] = dice.choice(damages.VALUES)
    path.write_text(json.dumps(data))


def edit_layout(folder: Path, dice: random.Random) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    layout = dice.choice(list(data["quantization_config"]["modules"].values()))
    values = [*damages.VALUES, {"2": 48}, {"4": 24, "2": 24}]
    layout[dice.choice(sorted(layout))] = dice.choice(values)
    path.write_text(json.dumps(data))


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    **{damage: partial(change_bytes, damage) for damage in damages.BYTES},
    **{
        mutation.__name__: mutation
        for mutation in (
            *(flip_in_header, remove, swap_files, swap_tensors),
            *(edit_json, edit_config, edit_layout),
        )
    },
}


def logits(folder: Path, kernel: str) -> torch.Tensor:
    with torch.inference_mode():
        return load_checkpoint(folder, kernel=kernel)(TOKENS).logits


def compared(folder: Path, kernel: str, expected: torch.Tensor) -> str:
    """Load a checkpoint and say whether its logits are equal, or other HASH."""
    found = logits(folder, kernel)
    digest = hashlib.sha256(found.numpy().tobytes()).hexdigest()[:8]
    return "equal" if torch.equal(found, expected) else f"other {digest}"


def main(originals: list[Path], place: Path, rounds: int) -> None:
    """Damage and load; every damage once as it is, and once covered up by a new manifest."""
    expected = logits(originals[0], KERNELS[0])
    for name, mutation in MUTATIONS.items():
        for seed in range(rounds):
            folder = Path(shutil.copytree(originals[seed % len(originals)], place / "damaged"))
            mutation(folder, random.Random(f"{name} {seed}"))
            for covered in (False, True):
                if covered:
                    with contextlib.suppress(ClaqError):
                        write_manifest(folder)
                for kernel in KERNELS:
                    found = damages.outcome(partial(compared, folder, kernel, expected))
                    case = {"mutation": name, "seed": seed, "covered": covered, "kernel": kernel}
                    damages.say(**case, outcome=found)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), int(sys.argv[3]))
