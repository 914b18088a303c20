"""Ctrl-C and SIGTERM: the first waits until what is at hand is published, the second does not."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL: schedulers and shells may try the same command again
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = "finishing the group of layers at hand; press again to stop at once"


class Interrupted(KeyboardInterrupt):
    """A person or a scheduler asked for the end; no `except Exception` takes it for a fault."""


class Interruption:
    """Whether an end was asked for, and whether that can wait for the work at hand.

    output: descriptor for the notice, or None where nobody reads it.
    """

    def __init__(self, output: int | None = None) -> None:
        self._output = output
        self._signals = 0
        self._patient = False

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._signals > 0

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Let the first signal wait for the next `check`, or for the end of this context."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
        self.check()

    def check(self) -> None:
        """Raise Interrupted when a signal came while it had to wait."""
        if self.asked:
            raise Interrupted

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        """Take a signal, as a handler of Python's `signal` module."""
        self._signals += 1
        if self._signals == 1 and self._patient:
            self._say(NOTICE)
            return
        if self._signals > 1:
            for number in SIGNALS:  # a third ends the process in whatever it hangs
                signal.signal(number, signal.SIG_DFL)
        raise Interrupted

    def _say(self, line: str) -> None:
        if self._output is not None:
            start = "\n" if os.isatty(self._output) else ""  # leaves the line of a progress bar
            with contextlib.suppress(OSError):
                os.write(self._output, f"{start}claq-exp: {line}\n".encode())


@contextlib.contextmanager
def graceful() -> Iterator[Interruption]:
    """Take SIGINT and SIGTERM while this is open, and give back the handlers that were there.

    The notice goes to what is standard error now, wherever that is sent later.  A signal that was
    ignored stays ignored (`nohup`, a shell's background), and outside the main thread, where Python
    allows no handlers, nothing is taken.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Interruption()
        return
    output = os.dup(2)
    interruption = Interruption(output)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {
        number: handler
        for number, handler in handlers.items()
        if handler not in (signal.SIG_IGN, None)  # None: set by something that is not Python
    }
    try:
        for number in before:
            signal.signal(number, interruption.handle)
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(output)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold signals back while this is open; their handlers are called when it closes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers = {int(number): signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in before:
            signal.signal(number, lambda *arrived: came.append(arrived))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in came:
            before[number](number, frame)
