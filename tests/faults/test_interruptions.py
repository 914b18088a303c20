"""The first signal waits for the work at hand where there is some; the second waits for nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from claq_exp.system.interruption import NOTICE, SIGNALS, Interrupted, graceful

pytestmark = pytest.mark.case(3, 4)


@pytest.fixture(autouse=True)
def heeded():
    """A shell starts what runs in its background with SIGINT ignored, and tests inherit that."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_at_once_where_nothing_is_at_hand(number):
    with pytest.raises(Interrupted), graceful():
        send(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_next_check_and_says_so_once(number, capfd):
    reached = []
    with pytest.raises(Interrupted), graceful() as interruption, interruption.finishing():
        interruption.check()
        send(number)
        reached.append("after the signal")
        interruption.check()
        reached.append("after the check")
    assert reached == ["after the signal"]
    assert capfd.readouterr().err == f"claq-exp: {NOTICE}\n"


def test_a_signal_that_no_check_followed_is_not_lost():
    with pytest.raises(Interrupted), graceful() as interruption:
        with interruption.finishing():
            send(signal.SIGTERM)
        pytest.fail("the end was asked for")


def test_a_fault_while_a_signal_waits_is_not_hidden_by_it():
    with (
        pytest.raises(ValueError, match="a fault"),
        graceful() as interruption,
        interruption.finishing(),
    ):
        send(signal.SIGINT)
        raise ValueError("a fault")


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_at_once_and_a_third_kills(second):
    reached = []
    with pytest.raises(Interrupted), graceful() as interruption, interruption.finishing():
        send(signal.SIGTERM)
        reached.append(1)
        try:
            send(second)
            reached.append(2)
        finally:
            handlers = {signal.getsignal(number) for number in SIGNALS}
    assert reached == [1]
    assert handlers == {signal.SIG_DFL}


def test_no_except_exception_takes_it_for_a_fault():
    with pytest.raises(Interrupted), graceful(), contextlib.suppress(Exception):
        send(signal.SIGTERM)


def test_the_handlers_that_were_there_come_back():
    with contextlib.suppress(Interrupted), graceful():
        with graceful(), contextlib.suppress(Interrupted):
            send(signal.SIGINT)
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_was_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with graceful():
        send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_another_thread_takes_no_signals():
    seen = []

    def work() -> None:
        with graceful() as interruption, interruption.finishing():
            seen.append(signal.getsignal(signal.SIGINT))
            interruption.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
