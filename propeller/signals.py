"""The signals that ask a process to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[dict[int, Any]]:
    """Has SIGINT, SIGTERM and SIGHUP call `handler` within the block, and puts back what was there.

    One that is ignored stays so: SIGHUP under `nohup`, SIGINT of what a script has started in the background.
    Beside the main thread, which alone may ask for signals, nothing is done.

    Yields:
        The handler that each signal had; what stands there at the end is put back.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # Windows lacks one.
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[int(number)] = signal.signal(number, handler)
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
