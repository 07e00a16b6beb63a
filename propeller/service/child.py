"""A forked process as its parent sees it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import NoReturn

from propeller.errors import PropellerError

log = logging.getLogger("propeller")

# What asks a process to end. Ctrl-C and systemd ask every process of a group; the parent is to decide.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Child:
    """A process that was forked from this one, with a pipe to it.

    It runs `main` and ends with the exit code 0, or 1 where that raises. When one of the two dies, the other
    finds the pipe at its end.

    Args:
        name: for messages.
        main: gets the child's end of the pipe.
        siblings: forked before from this process.
    """

    def __init__(self, name: str, main: Callable[[socket.socket], None], siblings: Iterable[Child] = ()):
        self.name = name
        self._pipe, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads. Those of ZMQ are not used by a child, which makes a context of its
            # own, and the math library's know of forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            _run(name, main, theirs, [self._pipe, *(child._pipe for child in siblings)])
        theirs.close()

    def fileno(self) -> int:
        """Can be read when the child says something, or is dead."""
        return self._pipe.fileno()

    def tell(self, what: bytes) -> None:
        """Sends some bytes; one that just died gets none."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.sendall(what)

    def hear(self) -> bytes:
        """Returns what it says; nothing if it is dead."""
        try:
            return self._pipe.recv(1 << 16)
        except ConnectionResetError:  # it had not read all that it was told
            return b""

    def kill(self) -> None:
        """Ends it at once, by SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)

    def bury(self) -> int:
        """Waits for its end; returns its exit code, or minus the signal that killed it."""
        self._pipe.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _run(
    name: str, main: Callable[[socket.socket], None], pipe: socket.socket, others: Iterable[socket.socket]
) -> NoReturn:
    """Runs in the child and never returns: nothing that is the parent's may be ended here."""
    code = 1
    try:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # A parent's end that stayed open here would hide the parent's death.
        for end in others:
            end.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        main(pipe)
        code = 0
    except Exception:
        log.exception("worker %s failed", name)
    finally:
        sys.stdout.flush()
        os._exit(code)


def describe(code: int) -> str:
    """An exit code as `Child.bury` returns it, in words."""
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"exit status {code}"


def one_line(error: Exception, max_chars: int = 1000) -> str:
    """What an error says, in one line; of a long text the end, where Paddle says what is wrong."""
    text = " ".join(str(error).split())
    if not isinstance(error, PropellerError):
        text = f"{text[-max_chars + 40 :]} ({type(error).__name__})" if text else repr(error)
    return text[-max_chars:]
