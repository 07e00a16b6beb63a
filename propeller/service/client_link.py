"""A client's connection to a server: a DEALER socket that connects once, and what its monitor sees of that.

libzmq reconnects by itself, but gives up for good after some failures (keys that are refused, a message above
the limit), without a word; it takes the first of a name's addresses only; and it knocks for ever where an
idle client wants nothing. So here a lost link stays lost, and `connection.py` opens the next one when there
is something to send.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

from propeller.errors import ConfigError
from propeller.service.auth import secure_client
from propeller.service.frames import Frame
from propeller.service.wire import REPLY_LIMITS

# Messages, not bytes; what a client has on its way is bounded by its callers.
_HIGH_WATER_MARK = 1000
_CONNECT_TIMEOUT_MS = 3_000
_HANDSHAKE_TIMEOUT_MS = 10_000
# A peer that is gone without a word (power, a NAT that forgot) is noticed after both together. libzmq answers
# heartbeats by itself, however busy the server is.
_HEARTBEAT_MS = 5_000
_HEARTBEAT_TIMEOUT_MS = 10_000


class State(enum.Enum):
    """How far a link is."""

    CONNECTING = enum.auto()
    READY = enum.auto()
    LOST = enum.auto()
    REFUSED = enum.auto()


def check_address(address: str) -> None:
    """Refuses what a client cannot connect to.

    Raises:
        ConfigError: it is neither `tcp://host:port` nor `ipc://path`.
    """
    if isinstance(address, str) and address.startswith("ipc://") and address != "ipc://":
        return
    try:
        parts = urlsplit(address)
        good = parts.scheme == "tcp" and bool(parts.hostname and parts.port)
        good = good and not (parts.path or parts.query or parts.fragment or parts.username)
    except (ValueError, AttributeError):
        good = False
    if not good:
        raise ConfigError(
            f"The address is {address!r}; expected tcp://host:port, such as tcp://localhost:8888, or ipc://path."
        )


def resolve(address: str) -> list[str]:
    """Returns what to connect to, one after the other until one answers: each address of the host.

    `localhost` may stand for ::1 and 127.0.0.1 where the server listens on one of them only.

    Raises:
        OSError: the name is not known.
    """
    if address.startswith("ipc://"):
        return [address]
    parts = urlsplit(address)
    found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(str(place[0]) for *_, place in found)
    return [f"tcp://{f'[{host}]' if ':' in host else host}:{parts.port}" for host in hosts]


class Link:
    """One attempt at a connection, and the connection if it comes about.

    Args:
        context: of the thread that uses the link; nobody else may touch it.
        endpoint: one of those that `resolve` gave.
        curve_keys: folder of this client's keys; None: no encryption.

    Attributes:
        socket, monitor: to be polled; `monitor` has something to read when `update` has something to say.
        state: as of the last `update`.
        problem: why the link is not ready, for an error message.

    Raises:
        ConfigError: the keys cannot be read.
        zmq.ZMQError: the endpoint cannot be used.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, curve_keys: str | Path | None):
        self.state = State.CONNECTING
        self.problem = "nobody answers there"
        self._has_keys = curve_keys is not None
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.monitor = self.socket.get_monitor_socket()
        try:
            self._connect(endpoint, curve_keys)
        except Exception:
            self.close()
            raise

    def _connect(self, endpoint: str, curve_keys: str | Path | None) -> None:
        options = {
            zmq.LINGER: 0,
            zmq.IMMEDIATE: 1,
            zmq.IPV6: int("[" in endpoint),
            zmq.SNDHWM: _HIGH_WATER_MARK,
            zmq.RCVHWM: _HIGH_WATER_MARK,
            zmq.MAXMSGSIZE: REPLY_LIMITS.max_message_bytes,
            zmq.RECONNECT_IVL: -1,
            zmq.CONNECT_TIMEOUT: _CONNECT_TIMEOUT_MS,
            zmq.HANDSHAKE_IVL: _HANDSHAKE_TIMEOUT_MS,
            zmq.HEARTBEAT_IVL: _HEARTBEAT_MS,
            zmq.HEARTBEAT_TIMEOUT: _HEARTBEAT_TIMEOUT_MS,
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        if curve_keys is not None:
            secure_client(self.socket, curve_keys)
        self.socket.connect(endpoint)

    def update(self) -> State:
        """Reads what the monitor saw since the last time; a link that is over stays so."""
        while self.monitor.poll(0):
            message = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            if self.state in (State.CONNECTING, State.READY):
                self._saw(message["event"], message["value"])
        return self.state

    def _saw(self, event: int, value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.state = State.READY
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.state = State.REFUSED
            self.problem = "the server refused the keys of this client; its public key must be let in there"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and (
            value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
        ):
            self.state = State.REFUSED
            self.problem = (
                "this client uses keys and the server does not; leave out curve_keys"
                if self._has_keys
                else "the server wants keys and this client has none; give curve_keys"
            )
        elif event in (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
            self.problem = (
                "what listens there hangs up, as a server does whose keys are not those of server.key here"
                if self._has_keys
                else "what listens there hangs up; it may be no inference server"
            )
        elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            if self.state is State.READY:
                self.problem = "the server hung up"
            self.state = State.LOST

    def send(self, frames: Sequence[Frame]) -> bool:
        """Sends a message; returns False when there is no room for it now.

        Large frames are not copied: what they show must not change before the reply is there.
        """
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[memoryview] | None:
        """Returns the next message, or None if there is none now."""
        try:
            return [frame.buffer for frame in self.socket.recv_multipart(zmq.NOBLOCK, copy=False)]
        except zmq.Again:
            return None

    def close(self) -> None:
        """Hangs up; what was not sent yet is dropped."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
