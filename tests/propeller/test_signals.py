"""The signals that ask a process to end."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from propeller import signals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _put_back():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_all_are_handled_and_put_back():
    got = []
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(ZeroDivisionError), signals.handled(lambda number, _: got.append(number)) as previous:
        assert [previous[number] for number in NUMBERS] == before
        for number in NUMBERS:
            os.kill(os.getpid(), number)
        raise ZeroDivisionError
    assert got == [*NUMBERS]
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("ignored", NUMBERS)
def test_one_that_is_ignored_stays_so(ignored):
    got = []
    signal.signal(ignored, signal.SIG_IGN)
    with signals.handled(lambda number, _: got.append(number)):
        for number in NUMBERS:
            os.kill(os.getpid(), number)
    assert got == [number for number in NUMBERS if number != ignored]
    assert signal.getsignal(ignored) is signal.SIG_IGN


def test_what_is_to_be_put_back_can_be_changed():
    with signals.handled(lambda number, _: None) as previous:
        previous[signal.SIGTERM] = signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_beside_the_main_thread_nothing_is_done():
    before = [signal.getsignal(number) for number in NUMBERS]

    def aside():
        with signals.handled(lambda number, _: None) as previous:
            return previous, [signal.getsignal(number) for number in NUMBERS]

    with ThreadPoolExecutor() as threads:
        assert threads.submit(aside).result() == ({}, before)
