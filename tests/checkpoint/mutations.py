"""Random damages of a checkpoint, and a program that loads what they leave, under limits.

    python mutations.py FOLDER OF CHECKPOINTS, WORKPLACE, ROUNDS

It writes a line of JSON for each damage and each way to load it.  Memory may grow by `ROOM` bytes,
and a load may take `SECONDS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from claq_exp.checkpoint.manifest import write_manifest
from claq_exp.checkpoint.shards import read_spans
from claq_exp.errors import ClaqError
from claq_exp.runtime.load import load_checkpoint

TOKENS = torch.arange(12).reshape(1, 12)
VALUES: list[Any] = [None, -1, 0, 1, 2, 2**40, 2.5, 1e300, True, "", "x", "../x", [], [1], {}]
KERNELS = ("dense", "reference")
ROOM = 1 << 30
SECONDS = 10


def some_file(folder: Path, dice: random.Random, pattern: str = "*") -> Path:
    return dice.choice(sorted(folder.glob(pattern)))


def flip(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def flip_in_header(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice, "*.safetensors")
    content = bytearray(path.read_bytes())
    content[dice.randrange(8 + int.from_bytes(content[:8], "little"))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def cut(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def grow(folder: Path, dice: random.Random) -> None:
    with some_file(folder, dice).open("ab") as file:
        file.write(dice.randbytes(dice.randint(1, 20)))


def insert(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    content = path.read_bytes()
    place = dice.randrange(len(content))
    path.write_bytes(content[:place] + dice.randbytes(dice.randint(1, 20)) + content[place:])


def delete(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    content = path.read_bytes()
    place = dice.randrange(len(content))
    path.write_bytes(content[:place] + content[place + dice.randint(1, 20) :])


def overwrite(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    content = bytearray(path.read_bytes())
    size = min(len(content), dice.choice([4, 8, 64, 4096]))
    place = dice.randrange(len(content) - size + 1)
    content[place : place + size] = dice.choice([bytes(size), b"\xff" * size])
    path.write_bytes(content)


def swap_bytes(folder: Path, dice: random.Random) -> None:
    path = some_file(folder, dice)
    content = bytearray(path.read_bytes())
    size = min(len(content) // 2, dice.choice([1, 4, 64]))
    first = dice.randrange(len(content) // 2 - size + 1)
    second = dice.randrange(len(content) // 2, len(content) - size + 1)
    one, two = content[first : first + size], content[second : second + size]
    content[first : first + size], content[second : second + size] = two, one
    path.write_bytes(content)


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
    place: Any = data
    while True:
        key = dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], dict | list) and place[key]) or dice.random() < 0.1:
            break
        place = place[key]
    change = dice.randrange(4)
    if change == 0:
        del place[key]
    elif change == 1 and isinstance(place, dict):
        place[dice.choice(["x", "../x", "dtype", "auto_map"])] = place.pop(key)
    else:
        place[key] = dice.choice(VALUES)
    path.write_text(json.dumps(data))


def edit_config(folder: Path, dice: random.Random) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data[dice.choice(sorted(data))] = dice.choice(VALUES)
    path.write_text(json.dumps(data))


def edit_layout(folder: Path, dice: random.Random) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    layout = dice.choice(list(data["quantization_config"]["modules"].values()))
    layout[dice.choice(sorted(layout))] = dice.choice([*VALUES, {"2": 48}, {"4": 24, "2": 24}])
    path.write_text(json.dumps(data))


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    mutation.__name__: mutation
    for mutation in (
        *(flip, flip_in_header, cut, grow, insert, delete, overwrite, remove),
        *(swap_bytes, swap_files, swap_tensors, edit_json, edit_config, edit_layout),
    )
}


def logits(folder: Path, kernel: str) -> torch.Tensor:
    with torch.inference_mode():
        return load_checkpoint(folder, kernel=kernel)(TOKENS).logits


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Let memory grow by ROOM and time by SECONDS; more of either is an exception."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now = 1024 * int(status.partition("VmSize:")[2].split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def for_memory(error: BaseException | None) -> bool:
    """Tell whether memory ran out somewhere before an error."""
    while error is not None:
        if isinstance(error, MemoryError) or "alloc" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def outcome(folder: Path, kernel: str, expected: torch.Tensor) -> str:
    """Load a checkpoint and say what came of it: equal, other HASH, refused or the exception."""
    try:
        with limits():
            found = logits(folder, kernel)
    except ClaqError as error:
        if "\n" in str(error):
            return f"several lines: {error}"
        return f"memory: {error}" if for_memory(error) else "refused"
    except BaseException as error:  # noqa: BLE001 - what a test has to see
        return f"{type(error).__name__}: {error}"
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
                    case = {"mutation": name, "seed": seed, "covered": covered, "kernel": kernel}
                    line = {**case, "outcome": outcome(folder, kernel, expected)}
                    sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(sorted(Path(sys.argv[1]).iterdir()), Path(sys.argv[2]), int(sys.argv[3]))
