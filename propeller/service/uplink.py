"""The connection of a host or a worker to the server."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import zmq

from propeller.errors import ServerError, ServiceError
from propeller.service.frames import Frame, MessageReader, to_frames
from propeller.service.wire import REPLY_LIMITS

log = logging.getLogger("propeller")

# How long the last messages may take to leave.
_LINGER_MS = 2000
# A connection to another machine that is dead without having been closed is noticed by the second.
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 2000, 10_000


class Uplink:
    """A DEALER to the server's ROUTER that says who it is as soon as it is connected.

    While there is no connection all else that is sent is dropped: it is for a server that is gone, and the
    next one asks who is there.

    Args:
        endpoint: `ipc://` or `tcp://`.
        curve_keys: folder of keys; None: no encryption.

    Raises:
        ConfigError: a key is missing.
    """

    def __init__(self, endpoint: str, curve_keys: str | None):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        if endpoint.startswith("tcp:"):
            self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
            self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        if curve_keys is not None:
            from propeller.service.auth import secure_client

            secure_client(self._socket, curve_keys, "worker")
        self._socket.connect(endpoint)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._announcement: list[Frame] | None = None

    @property
    def is_announced(self) -> bool:
        """Whether the last announcement has been sent."""
        return self._announcement is None

    def watch(self, descriptor: int) -> None:
        """Has `wait` wait for this file, too."""
        self._poller.register(descriptor, zmq.POLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Undoes `watch`; to be called before the file is closed."""
        self._poller.unregister(descriptor)

    def announce(self, kind: str, id: str, about: Mapping[str, Any]) -> None:
        """Says who this is, now or as soon as there is a connection."""
        self._announcement = to_frames({"id": id, "kind": kind, **about}, (), None, ServerError)
        self._try_announcement()

    def _try_announcement(self) -> None:
        if self._announcement is not None and self.send_frames(self._announcement):
            self._announcement = None
        events = zmq.POLLIN if self._announcement is None else zmq.POLLIN | zmq.POLLOUT
        self._poller.modify(self._socket, events)

    def send(self, kind: str, id: str, about: Mapping[str, Any]) -> bool:
        """Sends a message without arrays; returns whether there was a connection."""
        return self.send_frames(to_frames({"id": id, "kind": kind, **about}, (), None, ServerError))

    def send_frames(self, frames: list[Frame]) -> bool:
        """Sends a message, large frames without a copy; returns whether there was a connection."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def wait(self, timeout_s: float | None = None) -> set[int]:
        """Waits for a message, or until a watched file can be read or is at its end, or the time is up.

        Returns:
            The watched files that can be read.
        """
        timeout_ms = None if timeout_s is None else math.ceil(timeout_s * 1000)
        events = dict(self._poller.poll(timeout_ms))
        if events.pop(self._socket, 0) & zmq.POLLOUT:
            self._try_announcement()
        return set(events)

    def receive(self) -> MessageReader | None:
        """Takes the next message that is there; None if there is none. Its arrays are not copied."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            try:
                return MessageReader([frame.buffer for frame in frames], REPLY_LIMITS, ServiceError)
            except ServiceError as error:  # its sender waits in vain, but the next message may be whole
                log.error("a message of the server cannot be read: %s", error)

    def close(self) -> None:
        """Waits a little for what was sent to leave, and ends the connection."""
        self._socket.close()
        self._context.term()
