"""Workers on this machine for the server of another one.

    read the bundle -> hosts join -> ... -> the server lets them go, or a signal ends it -> all gone

The server takes them if they have the bundle that it serves. It lets them go when it has taken over a newer
version: then the folder is read again, and they join anew once it has that version, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from propeller.bundle import read_bundle
from propeller.cores import available_cores
from propeller.errors import PropellerError
from propeller.service.plan import host_settings
from propeller.service.settings import ServerSettings, worker_plan
from propeller.service.spawn import end_host, start_host

log = logging.getLogger("propeller")

_LOOK_S = 0.2
# Between two tries to join.
_AGAIN_S = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def join(address: str, settings: ServerSettings) -> int:
    """Runs workers for a server until a signal ends it.

    The first signal has them finish what they run; the second ends them at once.

    Args:
        address: where that server lets hosts join.
        settings: models, devices, workers and keys.

    Returns:
        The exit status: 0, or 1 if a host failed, which ends all.

    Raises:
        ExportError: a folder is no bundle.
    """
    with _signals() as bell, contextlib.ExitStack() as stack:
        members = [
            _Member(address, settings, name, path, place)
            for name, path in settings.models.items()
            for place in range(len(worker_plan(settings, available_cores())))
        ]
        for member in members:
            stack.callback(member.kill)
            member.start()
        told = failed = False
        while True:
            if _rings(bell, _LOOK_S):
                log.info("the workers end at once" if told else "the workers finish what they run")
                told = True
                for member in members:
                    member.ask_to_end()
            statuses = [member.status for member in members]
            failed = failed or any(statuses)
            if told and None not in statuses:
                return 0
            if failed and not told:
                return 1
            for member, status in zip(members, statuses, strict=True):
                if status == 0 and not told:
                    member.tick()


class _Member:
    """One host, started again when the server lets it go."""

    def __init__(self, address: str, settings: ServerSettings, name: str, path: Path, place: int):
        self._address, self._settings, self._name, self._path = address, settings, name, path
        self._place = place
        self._again_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        bundle = read_bundle(self._path)
        keys = str(self._settings.curve_keys)
        hosts = list(host_settings(self._settings, self._name, bundle, self._address, keys))
        log.info("joining %s with workers for %s", self._address, self._name)
        self.process = start_host(dataclasses.replace(hosts[self._place], host_id=secrets.token_hex(8)))
        self._again_at = 0.0

    def tick(self) -> None:
        """Starts it again some time after it has ended, with the bundle that is there then."""
        now = time.monotonic()
        if not self._again_at:
            log.info("the server let go of the workers of %s; they join again in %d s", self._name, _AGAIN_S)
            self._again_at = now + _AGAIN_S
        elif now >= self._again_at:
            try:
                self.start()
            except (PropellerError, OSError) as error:  # a bundle that is just being copied, say
                log.error("the workers of %s cannot be started: %s", self._name, error)
                self._again_at = now + _AGAIN_S

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return None if self.process is None else self.process.poll()

    def ask_to_end(self) -> None:
        """Has the workers finish what they run; asked a second time they end at once."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(b"\0")

    def kill(self) -> None:
        """Ends it, and its workers, at once."""
        if self.process is not None:
            end_host(self.process)


def _rings(bell: socket.socket, timeout_s: float) -> bool:
    """Waits for a signal; returns whether one came."""
    if not select.select([bell], [], [], timeout_s)[0]:
        return False
    bell.recv(1)
    return True


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that gets a byte for each signal, in place of what the signals do otherwise."""
    ear, bell = socket.socketpair()
    with ear, bell:
        for end in (ear, bell):
            end.setblocking(False)
        before = {number: signal.signal(number, lambda number, frame: None) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(bell.fileno())
        try:
            yield ear
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
