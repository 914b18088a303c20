"""Random damages of a file, and what comes of using it under limits of memory and time.

Programs that tests start use this: a process that crashes, hangs or takes all memory must not be
that of the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from claq_exp.errors import ClaqError

ROOM = 1 << 30  # bytes by which memory may grow
SECONDS = 10
VALUES: list[Any] = [None, -1, 0, 1, 2, 2**40, 2.5, 1e300, True, "", "x", "../x", [], [1], {}]


def flip(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]


def cut(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def grow(content: bytes, dice: random.Random) -> bytes:
    return content + dice.randbytes(dice.randint(1, 20))


def insert(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + dice.randbytes(dice.randint(1, 20)) + content[place:]


def delete(content: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + content[place + dice.randint(1, 20) :]


def overwrite(content: bytes, dice: random.Random) -> bytes:
    size = min(len(content), dice.choice([4, 8, 64, 4096]))
    place = dice.randrange(len(content) - size + 1)
    return content[:place] + dice.choice([b"\0", b"\xff"]) * size + content[place + size :]


def swap(content: bytes, dice: random.Random) -> bytes:
    size = min(len(content) // 2, dice.choice([1, 4, 64]))
    first = dice.randrange(len(content) // 2 - size + 1)
    second = dice.randrange(len(content) // 2, len(content) - size + 1)
    one, two = content[first : first + size], content[second : second + size]
    rest = content[second + size :]
    return content[:first] + two + content[first + size : second] + one + rest


BYTES = {damage.__name__: damage for damage in (flip, cut, grow, insert, delete, overwrite, swap)}


def edit_json(data: Any, dice: random.Random) -> None:
    """Change, remove or rename one entry somewhere inside of JSON data."""
    place = data
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


def outcome(use: Callable[[], str]) -> str:
    """Say what `use` came to: what it returns, refused (one line of ours), or what went wrong."""
    try:
        with limits():
            return use()
    except ClaqError as error:
        if "\n" in str(error):
            return f"several lines: {error}"
        return f"memory: {error}" if _for_memory(error) else "refused"
    except BaseException as error:  # noqa: BLE001 - what a test has to see
        return f"{type(error).__name__}: {error}"


def _for_memory(error: BaseException | None) -> bool:
    """Tell whether memory ran out somewhere before an error."""
    while error is not None:
        words = str(error).replace("allocation", "")  # a config group
        if isinstance(error, MemoryError) or "alloc" in words:
            return True
        error = error.__cause__ or error.__context__
    return False


def say(**case: object) -> None:
    """Write a line that `started` returns."""
    sys.stdout.write(json.dumps(case) + "\n")
    sys.stdout.flush()


def started(program: str, *arguments: object) -> list[dict]:
    """Run a program of the tests to its end and return what it said."""
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, said[-1:], done.stderr[-2000:])
    return said
