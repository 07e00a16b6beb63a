"""The socket that clients talk to: whole messages in, replies out, and who is gone."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from propeller.errors import ConfigError
from propeller.service.frames import Frame
from propeller.service.wire import Reply, encode_reply

log = logging.getLogger("propeller")

# Messages handled before workers and timers get their turn.
_MESSAGES_A_TURN = 64
# What is said to a client to learn whether it is there: the reply to a request that nobody made. Clients
# that count their requests begin with 0 or 1.
_NOBODYS_ID = "are you there?"
# A connection that ends is forgotten by the socket a moment after the monitor tells of it.
_PROBES = 3
# Replies to clients that do not read wait, and are lost beyond so many bytes of all of them.
_MAX_UNSENT_BYTES = 256 << 20


class Client(NamedTuple):
    """A connection of a client: its frontend's number, and the name that ZeroMQ gave it."""

    frontend: int
    identity: bytes


class Frontend:
    """A bound ROUTER.

    Args:
        context: where the socket is made.
        number: tells it from the server's other frontends.
        endpoint: where to bind.
        max_message_bytes: larger frames end the connection.
        secure: sets keys on the socket.

    Attributes:
        address: where it is bound, with the port that was taken if any would do.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        number: int,
        endpoint: str,
        *,
        max_message_bytes: int,
        secure: Callable[[zmq.Socket[Any]], None] | None = None,
    ):
        self.number = number
        self.socket = context.socket(zmq.ROUTER)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self._bind(endpoint, max_message_bytes, secure)
        except BaseException:
            self.close()  # an open socket keeps its context from ending
            raise
        self.address = self.socket.last_endpoint.decode().rstrip("\0")
        self._connections: dict[int, set[bytes]] = {}  # who is behind a file descriptor
        self._suspects: deque[tuple[bytes, int]] = deque()
        self._unsent: dict[bytes, deque[list[Frame]]] = {}  # by client, in order
        self._unsent_bytes = 0

    def _bind(
        self, endpoint: str, max_message_bytes: int, secure: Callable[[zmq.Socket[Any]], None] | None
    ) -> None:
        socket = self.socket
        socket.ipv6 = "[" in endpoint  # else libzmq names an IPv4 address as an IPv6 one
        socket.linger = 1000
        socket.maxmsgsize = max_message_bytes
        socket.router_mandatory = True
        socket.sndtimeo = 0
        # A machine that went away without a word gives its connection back.
        socket.tcp_keepalive, socket.tcp_keepalive_idle = 1, 60
        socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = 10, 3
        if secure is not None:
            secure(socket)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"{endpoint} cannot be listened on: {error}. Another server may have the port; take another."
            ) from error

    def receive(self) -> Iterator[tuple[Client, list[Frame]]]:
        """Gives the messages that are there, some at a time; `frames` are without the sender's name."""
        for _ in range(_MESSAGES_A_TURN):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            identity = parts[0].bytes
            # The first versions of the protocol have no such thing.
            with contextlib.suppress(zmq.ZMQError):
                self._connections.setdefault(parts[-1].get(zmq.SRCFD), set()).add(identity)
            yield Client(self.number, identity), [part.buffer for part in parts[1:]]

    def send(self, identity: bytes, reply: Reply) -> bool:
        """Sends a reply, now or when the client reads again.

        Returns:
            False if the reply is lost: the client is gone, or too much waits for those that do not read.

        Raises:
            ServerError: the reply cannot be encoded.
        """
        frames = encode_reply(reply)
        waiting = self._unsent.get(identity)
        sent = None if waiting else self._try(identity, frames)
        if sent is not None:
            return sent
        size = sum(map(len, frames))
        if self._unsent_bytes + size > _MAX_UNSENT_BYTES:
            return False
        self._unsent.setdefault(identity, deque()).append(frames)
        self._unsent_bytes += size
        return True

    def _try(self, identity: bytes, frames: list[Frame]) -> bool | None:
        """Sends; returns False if nobody is there, None if the client has too much to read already."""
        try:
            self.socket.send_multipart([identity, *frames], copy=False)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def send_again(self) -> None:
        """Tries what could not be sent before."""
        for identity, waiting in list(self._unsent.items()):
            while waiting and self._try(identity, waiting[0]) is not None:
                self._unsent_bytes -= sum(map(len, waiting.popleft()))
            if not waiting:
                del self._unsent[identity]

    @property
    def has_unsent(self) -> bool:
        """Whether replies wait for clients that do not read."""
        return bool(self._unsent)

    def gone(self, has_work: Callable[[Client], bool]) -> list[Client]:
        """Returns the clients that were found to be gone.

        The monitor names file descriptors, which are used again, so whoever it tells of is asked first.

        Args:
            has_work: whether there is something to drop for a client; others are not asked.
        """
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            for identity in self._connections.pop(event["value"], ()):
                self._suspects.append((identity, _PROBES))
        found = []
        for _ in range(len(self._suspects)):
            identity, probes = self._suspects.popleft()
            client = Client(self.number, identity)
            if not has_work(client):
                continue
            if not self.send(identity, Reply(_NOBODYS_ID, result={})):
                found.append(client)
            elif probes > 1:
                self._suspects.append((identity, probes - 1))
        return found

    def close(self) -> None:
        """Closes the socket; replies that are on their way get a second."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close()
