"""Run a command, and note its CPU seconds and its peak memory.

    python examples/peers/measured.py NAME COMMAND...

A line of made/costs.csv is written for NAME, or replaced.  CPU seconds are user and system time of
the command and all that it starts.  The peak is the largest resident memory of one process: the
kernel's own count, read ten times a second, for a program may set it back.  Linux.
"""

from __future__ import annotations

import csv
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

COSTS = Path("made/costs.csv")
FIELDS = ("name", "cpu_seconds", "wall_seconds", "peak_gib")
EVERY = 0.1  # seconds


def costs(folder: Path = Path()) -> dict[str, dict[str, str]]:
    """Return name -> its line of the file."""
    path = folder / COSTS
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def peak(process: int) -> int:
    """Return the largest peak of a process and its descendants, in kilobytes."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    own = re.search(r"VmHWM:\s+(\d+) kB", status)
    return max([int(own[1]) if own else 0, *(peak(int(child)) for child in children)])


def cpu_seconds() -> float:
    """Return user and system time of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(name: str, *command: str) -> int:
    """Return the exit status of the command; a command that fails leaves no line."""
    start, most, before = time.monotonic(), 0, cpu_seconds()
    with subprocess.Popen(command) as running:
        while running.poll() is None:
            most = max(most, peak(running.pid))
            time.sleep(EVERY)
    wall = time.monotonic() - start
    if running.returncode:
        return running.returncode
    row = {
        "name": name,
        "cpu_seconds": f"{cpu_seconds() - before:.1f}",
        "wall_seconds": f"{wall:.1f}",
        "peak_gib": f"{most / 2**20:.2f}",
    }
    COSTS.parent.mkdir(parents=True, exist_ok=True)
    rows = costs() | {name: row}
    with COSTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows.values())
    print(f"{name}: {row['cpu_seconds']} CPU s, {row['peak_gib']} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
