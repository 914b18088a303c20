"""A job in a process of its own: its memory, seeds and threads are its own, and so is its death."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from claq_exp.errors import ClaqError, telling_line
from claq_exp.run_folder.jobs import JobInterruptedError, JobKilledError
from claq_exp.sweep.server import process_maker
from claq_exp.sweep.work import Done, OnShare, Order, run_here
from claq_exp.system.interruption import graceful
from claq_exp.tracking.progress import noise_to
from claq_exp.tracking.quiet import quiet_libraries

LOOK_SECONDS = 0.5  # between two looks at whether the sweep was stopped
LAST_SECONDS = 5.0  # for a job that must not wait for its work to write down how it ended


@dataclass(frozen=True)
class _Failed:
    reason: str


@dataclass(frozen=True)
class _Interrupted:
    """It was asked to end: by a scheduler, or by a person who knows its process."""


def run_apart(order: Order, on_share: OnShare, check: Callable[[], None] = lambda: None) -> Done:
    """Run a job in a child process and wait for it.

    check: called now and then, to raise where the job is to be given up.  Raises ClaqError with
    the job's own reason, JobInterruptedError when the child itself was asked to end, or
    JobKilledError when it ended without a word.  Whatever is raised, the child is gone, and has
    finished the group of layers at hand unless a second signal came; and it ends by itself when
    this process is gone.
    """
    context = process_maker()
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, order))
    child.start()
    theirs.close()
    try:
        last = _listen(ours, on_share, check)
        child.join()
    except BaseException:
        _end(child)
        raise
    finally:
        ours.close()
    if isinstance(last, Done):
        return last
    if isinstance(last, _Failed):
        raise ClaqError(last.reason)
    if isinstance(last, _Interrupted):
        raise JobInterruptedError("its process was asked to end")
    code = child.exitcode or 0
    if code >= 0:
        raise ClaqError(f"its process ended without a word, with exit code {code}; see {order.log}")
    name = signal.Signals(-code).name
    hint = " (memory ran out, or a person did it)" if name == "SIGKILL" else ""
    raise JobKilledError(f"{name}{hint}")


def _listen(
    ours: Connection, on_share: OnShare, check: Callable[[], None]
) -> Done | _Failed | _Interrupted | None:
    """Return the child's last word, or None where it had none."""
    last = None
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            check()
            if ours.poll(LOOK_SECONDS):
                message = ours.recv()
                if isinstance(message, tuple):
                    on_share(*message)
                else:
                    last = message
    return last


def _end(child: multiprocessing.process.BaseProcess) -> None:
    """End a child as Ctrl-C does, and where that is interrupted, as a second one does."""
    try:
        _signal(child)
        child.join()
    except KeyboardInterrupt:
        _signal(child)
        child.join(LAST_SECONDS)
        raise
    finally:
        child.kill()
        child.join()


def _signal(child: multiprocessing.process.BaseProcess) -> None:
    if child.is_alive() and child.pid:
        os.kill(child.pid, signal.SIGINT)


def _child(connection: Connection, order: Order) -> None:
    """Do the work and send what became of it; progress goes the same way."""
    with contextlib.suppress(OSError):
        os.setsid()  # Ctrl-C reaches the sweep, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    word: Done | _Failed | _Interrupted = _Interrupted()
    with contextlib.suppress(KeyboardInterrupt), graceful():
        os.environ.clear()
        os.environ.update(order.environment)
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        quiet_libraries()
        order.log.parent.mkdir(parents=True, exist_ok=True)
        with noise_to(order.log):
            word = _work(order, lambda share, stage: connection.send((share, stage)))
        if not order.log.stat().st_size:
            order.log.unlink()
    connection.send(word)


def _work(order: Order, on_share: OnShare) -> Done | _Failed:
    try:
        return run_here(order, on_share)
    except ClaqError as error:
        return _Failed(str(error))
    except OSError as error:
        traceback.print_exc()
        return _Failed(f"{error.filename or 'a file'}: {error.strerror or error}")
    except Exception as error:  # noqa: BLE001 - a fault in the program must not stop other jobs
        traceback.print_exc()
        return _Failed(f"{type(error).__name__}: {telling_line(error)}; traceback in {order.log}")


def _end_with(connection: Connection) -> None:
    """End this process at once when the one that started it is gone."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)
