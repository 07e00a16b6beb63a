"""A process that runs beside a server for as long as that is ready, such as an HTTP front.

Its standard input is a pipe that ends with the server, however that ends; it should end then, too.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Mapping, Sequence

from propeller.service.backoff import Backoff

log = logging.getLogger("propeller")

# Between starts, until it has run for the longest of these pauses.
_RESTART_S = (1.0, 60.0)
# It answers what it has, and the server goes on for it meanwhile.
_STOP_S = 10.0


class Companion:
    """Runs a command, again when it ends; does nothing if the command is empty.

    Args:
        command: its words; `{name}` in a word becomes what `start` is given under that name.
    """

    def __init__(self, command: Sequence[str]):
        self._template = list(command)
        self._command: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._restart_at = self._started = 0.0
        self._backoff = Backoff(*_RESTART_S)

    @property
    def is_wanted(self) -> bool:
        """Whether there is a command."""
        return bool(self._template)

    def start(self, values: Mapping[str, str]) -> None:
        """Starts it."""
        self._command = self._template
        for name, value in values.items():
            self._command = [word.replace(f"{{{name}}}", value) for word in self._command]
        self._restart_at = 0.0
        self.tick()

    def tick(self) -> None:
        """Starts it again if it has ended; to be called now and then."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            log.error("%s ended with status %d", self._command[:3], self._process.returncode)
            self._process = None
            self._wait(now)
        if self._command and self._process is None and now >= self._restart_at:
            try:
                self._process, self._started = subprocess.Popen(self._command, stdin=subprocess.PIPE), now
            except OSError as error:
                log.error("%s cannot be started: %s", self._command[:3], error)
                self._wait(now)

    def _wait(self, now: float) -> None:
        if now - self._started > max(_RESTART_S):
            self._backoff.reset()
        self._restart_at = now + self._backoff.next()

    def ask_to_end(self) -> None:
        """Has it finish what it has, without waiting for that."""
        self._command = []
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    @property
    def has_ended(self) -> bool:
        """Whether it does not run."""
        return self._process is None or self._process.poll() is not None

    def close(self) -> None:
        """Ends it if it still runs."""
        self.ask_to_end()
        if self._process is not None:
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
