"""Starts the ranks of a run as torchrun would, without its agent: from a process that has torch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["claq_exp.run.assist", "claq_exp.run.runner", "claq_exp.cli"])
SECONDS = 120  # after which a rank counts as hanging


@dataclass
class Rank:
    """One process: what its work returned, how it ended, and what it wrote."""

    process: BaseProcess
    folder: Path
    number: int

    def value(self) -> Any:
        assert self.exit_code() == 0, self.output()
        return pickle.loads((self.folder / f"{self.number}.pickle").read_bytes())

    def exit_code(self) -> int:
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"rank {self.number} hangs: {self.output()}")
        return self.process.exitcode

    def output(self) -> str:
        log = self.folder / f"{self.number}.log"
        return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""

    def signal(self, which: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, which)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for something that this rank will do."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.is_alive() and time.monotonic() < deadline, self.output()
            time.sleep(0.005)


def start_ranks(work: Callable[..., Any], folder: Path, *arguments: Any, size: int) -> list[Rank]:
    """Start `work(*arguments)` in `size` processes with torchrun's environment.

    A number that it returns is the exit code too, as of the command line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for number in range(size):
        process = CONTEXT.Process(
            target=_run, args=(number, size, port, folder, work, arguments), daemon=True
        )
        process.start()
        ranks.append(Rank(process, folder, number))
    return ranks


def _run(
    number: int,
    size: int,
    port: int,
    folder: Path,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    place = {"RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**place, **address}.items()})
    log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 99
    try:
        value = work(*arguments)
        code = value if isinstance(value, int) else 0
        (folder / f"{number}.pickle").write_bytes(pickle.dumps(value))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - it is what a test looks at
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
