"""A process that forks for each run, so that a run on a tiny model takes about a second."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

# Does one run, so that everything is imported and compiled, and then forks for each command.
DRIVER = """
import json, os, resource, signal, sys, traceback
import claq_exp.cli, claq_exp.run.shape
claq_exp.run.shape.matmul_speed = lambda device: 1e11
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
print(claq_exp.cli.main(json.loads(sys.stdin.readline())), file=replies, flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if job["file_limit"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 99
        try:
            exec(job["fault"], {})
            code = claq_exp.cli.main(job["arguments"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, file=replies, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)
"""


# What a run's process does to itself before it begins.
KILL_AFTER_EVENT = """
import os, signal
from claq_exp.tracking.events import EventLog
whole = EventLog.event
def event(self, name, /, **data):
    whole(self, name, **data)
    if name == {name!r} and {value!r} in data.values():
        os.kill(os.getpid(), signal.SIGKILL)
EventLog.event = event
"""
KILL_AT_PUBLICATION = """
import os, signal
from claq_exp.checkpoint import store
whole, seen = store.write_json, []
def write_json(*arguments, **options):
    seen.append(arguments)
    if len(seen) == {number} and {moment!r} == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    whole(*arguments, **options)
    if len(seen) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
store.write_json = write_json
"""
NO_RENAME = """
import errno, os, pathlib
seen = []
def failing(whole):
    def move(self, target):
        seen.extend([target] if os.fspath(target).endswith({name!r}) else [])
        if len(seen) == {number}:
            raise OSError(errno.EIO, "Input/output error", os.fspath(target))
        return whole(self, target)
    return move
pathlib.Path.replace = failing(pathlib.Path.replace)
pathlib.Path.rename = failing(pathlib.Path.rename)
"""
FULL_EVENTS = """
import errno
from claq_exp.tracking.events import EventLog
class Full:
    def __init__(self, file):
        self.file, self.left = file, {bytes}
    def write(self, text):
        part = text[:self.left]
        self.left -= len(part)
        self.file.write(part)
        self.file.flush()
        if len(part) < len(text):
            raise OSError(errno.ENOSPC, "No space left on device")
    def flush(self):
        self.file.flush()
    def close(self):
        self.file.close()
whole = EventLog.__init__
def init(self, *arguments):
    whole(self, *arguments)
    self._file = Full(self._file)
EventLog.__init__ = init
"""
SLOW_GROUPS = """
import time
from claq_exp.run import quantize
whole = quantize.solve_linears
def solve_linears(*arguments, **options):
    for _ in range(2400):  # two minutes: whoever waits for a group is seen
        time.sleep(0.05)
    return whole(*arguments, **options)
quantize.solve_linears = solve_linears
"""
CLOCK_BACKWARDS = """
import itertools, time
now, steps = time.time(), itertools.count()
time.time = lambda: now - 60.0 * next(steps)
"""


class Child:
    """One command in a process of its own."""

    def __init__(self, driver: subprocess.Popen, log: Path) -> None:
        assert driver.stdout is not None
        self._stdout = driver.stdout
        self._log = log
        self._ended = False
        self.pid = int(self._stdout.readline())

    def signal(self, which: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, which)

    def exit_code(self) -> int:
        self._ended = True
        return int(self._stdout.readline())

    def end(self) -> None:
        """Leave nothing behind for the next test, whatever happened in this one."""
        if not self._ended:
            self.signal(signal.SIGKILL)
            self.exit_code()

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


def send(driver: subprocess.Popen, message: object) -> None:
    assert driver.stdin is not None
    driver.stdin.write(json.dumps(message) + "\n")
    driver.stdin.flush()


def run_folder(outputs: Path) -> Path:
    (folder,) = (outputs / "default").iterdir()
    return folder


def events(outputs: Path) -> list[dict]:
    found = []
    for path in outputs.glob("default/*/events.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def wait_for(outputs: Path, name: str, count: int) -> None:
    """Return when `count` events of a name are written, or the run is over."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        names = [event["event"] for event in events(outputs)]
        if names.count(name) >= count or "finished" in names:
            return
        time.sleep(0.002)
    raise TimeoutError(f"no {count} events '{name}' in {outputs}")


def tries(outputs: Path) -> list[list[dict]]:
    """The events of each try at the one run."""
    found: list[list[dict]] = []
    for event in events(outputs):
        if event["event"] == "started":
            found.append([])
        if found:
            found[-1].append(event)
    return found


def assert_at_most_a_block_repeated(outputs: Path) -> None:
    """A try goes on in the block in which the one before it stopped, or behind it."""
    worked = [
        [
            math.inf if event["block"] is None else event["block"]  # the embedding comes last
            for event in events_
            if event["event"] == "layer"
        ]
        for events_ in tries(outputs)
    ]
    worked = [blocks for blocks in worked if blocks]
    for before, after in itertools.pairwise(worked):
        assert before == sorted(before)
        assert after[0] >= before[-1]


def content(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}


def assert_same_outcome(folder: Path, undisturbed: Path) -> None:
    assert content(folder / "checkpoint") == content(undisturbed / "checkpoint")
    ours, theirs = (
        json.loads((path / "results.json").read_text()) for path in (folder, undisturbed)
    )
    for key in ("bits", "size", "perplexity", "kl", "fallbacks"):
        assert ours[key] == theirs[key]
    assert not (folder / "work").exists()
