"""The sockets of a server: those for clients, those for workers, and a bell that threads ring."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import math
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from propeller.errors import ConfigError, ServerError, ServiceError
from propeller.service.auth import Authenticator, secure_server
from propeller.service.frames import MessageReader, to_frames
from propeller.service.frontend import Frontend
from propeller.service.settings import ServerSettings, tcp_address
from propeller.service.wire import REPLY_LIMITS, WireArray

log = logging.getLogger("propeller")

Secure = Callable[[zmq.Socket[Any]], None]

# A connection to a machine that is gone without a word is noticed in seconds.
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2000, 10_000
# Of the private folders; the sockets in them, and the file that a server locks before it writes the mark.
_PREFIX, _CLIENTS, _WORKERS, _LOCK = "propeller-server-", "clients", "workers", "lock"
_MARK = b"The private folder of a propeller server, which holds a lock on this file while it runs.\n"
# Results read before clients and timers get their turn.
_MESSAGES_A_TURN = 16


class Address(NamedTuple):
    """Where to send to a host or worker: the number of the socket, and the name that ZeroMQ gave it."""

    backend: int
    identity: bytes


class Sockets:
    """Opened at once, closed by `close`; private addresses lie in a folder of their own, for this user alone.

    Args:
        settings: the server's.
        local_clients: open a private address for clients, too.

    Attributes:
        frontends: for clients; the first one is public.

    Raises:
        ConfigError: an address that cannot be bound, or keys that are missing.
    """

    def __init__(self, settings: ServerSettings, *, local_clients: bool = False):
        with contextlib.ExitStack() as stack:
            self._open(settings, local_clients, stack)
            self._stack = stack.pop_all()

    def _open(self, settings: ServerSettings, local_clients: bool, stack: contextlib.ExitStack) -> None:
        private = _private_folder(stack)
        self._ear, self._bell = socket.socketpair()
        for end in (self._ear, self._bell):
            end.setblocking(False)
            stack.callback(end.close)
        context = zmq.Context()
        stack.callback(context.term)
        self._authenticator = None
        client_keys: Secure | None = None
        worker_keys: Secure | None = None
        if settings.curve_keys is not None:
            self._authenticator = stack.enter_context(Authenticator(context, settings.curve_keys))
            client_keys = functools.partial(secure_server, folder=settings.curve_keys, role="client")
            worker_keys = functools.partial(secure_server, folder=settings.curve_keys, role="worker")
        endpoints = [(tcp_address(settings.bind, settings.port), client_keys)]
        if local_clients:
            endpoints.append((f"ipc://{private}/{_CLIENTS}", None))
        self.frontends = []
        for number, (endpoint, keys) in enumerate(endpoints):
            self.frontends.append(
                Frontend(context, number, endpoint, max_message_bytes=settings.max_message_bytes, secure=keys)
            )
            stack.callback(self.frontends[-1].close)
        endpoints = [(f"ipc://{private}/{_WORKERS}", None)]
        if settings.worker_port is not None:
            endpoints.append((tcp_address(settings.worker_bind, settings.worker_port), worker_keys))
        self._backends = []
        for endpoint, keys in endpoints:
            self._backends.append(context.socket(zmq.ROUTER))
            stack.callback(self._backends[-1].close, 1000)
            _bind_backend(self._backends[-1], endpoint, keys)
        self._poller = zmq.Poller()
        for item in (self._ear, *self._backends, *(each.socket for each in self.frontends)):
            self._poller.register(item, zmq.POLLIN)
        for frontend in self.frontends:
            self._poller.register(frontend.monitor, zmq.POLLIN)

    @property
    def worker_endpoints(self) -> list[str]:
        """Where workers connect: the server's own, then those that join if any can."""
        return [_bound(backend) for backend in self._backends]

    @property
    def bell(self) -> int:
        """File descriptor that ends `wait` when something is written to it."""
        return self._bell.fileno()

    def wait_for_workers(self, timeout_s: float) -> None:
        """Waits for messages of workers alone, and drops them."""
        for backend in self._backends:
            if backend.poll(math.ceil(timeout_s * 1000)):
                for _ in self.from_workers([backend]):
                    pass

    def ring(self) -> None:
        """Ends `wait`; may be called by any thread."""
        with contextlib.suppress(OSError):  # it rings already, or nobody listens any more
            self._bell.send(b"\0")

    def wait(self, timeout_s: float) -> Collection[Any]:
        """Waits until there is something to read, somebody rings, or the time is up.

        Returns:
            The sockets that can be read.
        """
        readable = dict(self._poller.poll(math.ceil(max(0.0, timeout_s) * 1000)))
        if readable.pop(self._ear.fileno(), None):
            with contextlib.suppress(BlockingIOError):
                self._ear.recv(4096)
        return readable

    def from_workers(self, readable: Collection[Any]) -> Iterator[tuple[Address, MessageReader]]:
        """Gives the messages of hosts and workers that are there, some at a time."""
        for number, backend in enumerate(self._backends):
            for _ in range(_MESSAGES_A_TURN if backend in readable else 0):
                try:
                    parts = backend.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                frames = [part.buffer for part in parts[1:]]
                try:
                    yield (
                        Address(number, parts[0].bytes),
                        MessageReader(frames, REPLY_LIMITS, ServiceError),
                    )
                except ServiceError as error:
                    log.error("a message of a worker cannot be read: %s", error)

    def to_worker(
        self, address: Address, header: Mapping[str, Any], arrays: Sequence[WireArray] = ()
    ) -> bool:
        """Sends to a host or worker; returns False if it is gone or takes nothing."""
        frames = to_frames(dict(header), arrays, None, ServerError)
        try:
            self._backends[address.backend].send_multipart([address.identity, *frames], copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def reload_keys(self) -> None:
        """Lets in whoever was allowed in since."""
        if self._authenticator is not None:
            self._authenticator.reload()

    def close(self) -> None:
        """Closes everything; replies that are on their way get a second."""
        self._stack.close()


def _private_folder(stack: contextlib.ExitStack) -> Path:
    """Makes a folder of this user's alone, and removes those that killed servers have left."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or just removed by somebody else
            _remove_left(left)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX)))
    lock = stack.enter_context((folder / _LOCK).open("wb", buffering=0))
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(_MARK)
    return folder


def _remove_left(folder: Path) -> None:
    """Removes what a killed server has left in its folder, and the folder; leaves what is anything else.

    Raises:
        OSError: its server runs, or it is not empty then.
    """
    about = folder.lstat()
    if about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode) or about.st_mode & 0o777 != 0o700:
        return
    with (folder / _LOCK).open("rb") as lock:
        if lock.read(len(_MARK) + 1) != _MARK:
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in (_CLIENTS, _WORKERS, _LOCK):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _bind_backend(backend: zmq.Socket[Any], endpoint: str, secure: Secure | None) -> None:
    backend.ipv6 = "[" in endpoint
    backend.router_mandatory = True
    backend.sndtimeo = 0
    backend.maxmsgsize = REPLY_LIMITS.max_message_bytes
    if endpoint.startswith("tcp:"):
        backend.heartbeat_ivl, backend.heartbeat_timeout = _HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS
    if secure is not None:
        secure(backend)
    try:
        backend.bind(endpoint)
    except zmq.ZMQError as error:
        advice = "Another server may have the port; take another one."
        if endpoint.startswith("ipc:"):
            advice = "Set TMPDIR to a folder with a short name that can be written."
        raise ConfigError(f"{endpoint} cannot be listened on for workers: {error}. {advice}") from error


def _bound(backend: zmq.Socket[Any]) -> str:
    endpoint: Any = backend.last_endpoint
    return str(endpoint, "utf-8").rstrip("\0")
