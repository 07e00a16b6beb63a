"""Workers on this machine for the server of another one.

    read the bundle -> hosts join -> ... -> the server lets them go, or a signal ends it -> all gone

The server takes them if they have the bundle that it serves. It lets them go when it has taken over a newer
version: then the folder is read again, and they join anew once it has that version, too.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import signal
import socket
import subprocess
from collections.abc import Iterator

from propeller.bundle import read_bundle
from propeller.cores import available_cores
from propeller.service.host import HostSettings, start_host
from propeller.service.settings import ServerSettings, worker_plan

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
        The exit status: 0, or 1 if a host failed.

    Raises:
        ExportError: a folder is no bundle.
    """
    with _signals() as bell:
        while True:
            hosts = [start_host(one) for one in _host_settings(address, settings)]
            try:
                told = _watch(hosts, bell)
            finally:
                for host in hosts:
                    host.kill()
                    host.wait()
            failed = [host for host in hosts if host.returncode > 0]
            if told or failed:
                return 1 if failed else 0
            log.info("the server let the workers go; they try to join again in %d s", _AGAIN_S)
            if _rings(bell, _AGAIN_S):
                return 0


def _host_settings(address: str, settings: ServerSettings) -> Iterator[HostSettings]:
    for name, path in settings.models.items():
        bundle = read_bundle(path)
        for group in worker_plan(settings, available_cores()):
            yield HostSettings(
                endpoint=address,
                host_id=secrets.token_hex(8),
                model=name,
                folder=str(bundle.folder),
                bundle_hash=bundle.hash,
                num_workers=group.num_workers,
                num_threads=group.num_threads,
                device=group.device,
                bf16=settings.bf16,
                warmup_s=settings.warmup_s,
                curve_keys=str(settings.curve_keys),
                verbose=settings.verbose,
            )


def _watch(hosts: list[subprocess.Popen[bytes]], bell: socket.socket) -> bool:
    """Waits until all hosts have ended; returns whether they were told to by a signal."""
    told = False
    while any(host.poll() is None for host in hosts):
        if _rings(bell, _LOOK_S):
            log.info("the workers end at once" if told else "the workers finish what they run")
            told = True
            for host in hosts:
                with contextlib.suppress(BrokenPipeError):
                    if host.stdin is not None:
                        host.stdin.write(b"\0")
                        host.stdin.flush()
    return told


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
