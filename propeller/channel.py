"""What the ranks of a run tell one another besides tensors: counts, requests to stop, results, failures.

A star over TCP with rank 0 at its centre; all ranks make every exchange in the same order. One that waits
has no time limit (gloo gives up after 30 s, and an export may take minutes), yet ends at once when a rank
fails: the kernel closes the connection of a process however that dies, and what a rank says before it goes
is passed on to all. Payloads are bytes, never pickles; who connects must have the run's key. (That reaches
the ranks through Paddle's own meeting place, which asks for none: whoever can reach its port can read it.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from typing import NoReturn

from propeller.errors import RankError

log = logging.getLogger("propeller")

_DATA, _FAILURE = b"D", b"F"
_COUNT = struct.Struct("<Q")
# How long rank 0 waits for all ranks to come, and for one that came to show the key: whoever connects to its
# port and says nothing must not hold up the start.
_JOIN_S = 300
_HANDSHAKE_S = 5
# (The last also ends a connection whose peer lives but does not read: large frames only after an exchange.)
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 15_000}
# How long a rank whose tensors did not come through waits to hear from the others why.
_EXPLANATION_S = 5.0


class Channel:
    """One rank's end of the star.

    Args:
        rank: this process.
        connections: of rank 0, one to each other rank in their order; of the others, the one to rank 0.
    """

    def __init__(self, rank: int, connections: Sequence[Connection]):
        self.rank = rank
        self._connections = list(connections)

    @classmethod
    def listen(cls, host: str, size: int, key: bytes, publish: Callable[[int], None]) -> Channel:
        """Opens rank 0's end and waits for the others.

        Args:
            host: the address to listen on.
            size: number of ranks.
            key: the run's secret.
            publish: tells the others the port.

        Raises:
            OSError: the others did not come.
        """
        connections: dict[int, Connection] = {}
        with socket.create_server((host, 0), backlog=size) as server:
            publish(server.getsockname()[1])
            deadline = time.monotonic() + _JOIN_S
            while len(connections) < size - 1:
                server.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
                client, address = server.accept()
                with client:
                    try:
                        rank, connection = _admitted(client, key)
                    except (OSError, EOFError, AuthenticationError) as error:
                        log.warning("turned away %s, which is no rank of this run: %s", address[0], error)
                    else:
                        connections[rank] = connection
        return cls(0, [connections[rank] for rank in sorted(connections)])

    @classmethod
    def connect(cls, host: str, port: int, key: bytes, rank: int) -> Channel:
        """Opens the end of another rank.

        Raises:
            OSError: rank 0 cannot be reached.
            multiprocessing.AuthenticationError: it has another key.
        """
        with socket.create_connection((host, port)) as client:
            connection = _connection_over(client)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        connection.send_bytes(_COUNT.pack(rank))
        return cls(rank, [connection])

    def exchange(self, payload: bytes) -> list[bytes]:
        """Gives every rank the payloads of all, in the order of the ranks.

        Raises:
            RankError: a rank has failed, and says why, or is gone.
        """
        if self.rank != 0:
            self._send(0, payload)
            return _unpacked(self._receive(0))
        found = {0: payload}
        pending = {connection: rank for rank, connection in enumerate(self._connections, start=1)}
        while pending:
            for connection in wait(list(pending)):
                rank = pending.pop(connection)  # type: ignore[call-overload]
                found[rank] = self._receive(rank)
        payloads = [found[rank] for rank in sorted(found)]
        packed = b"".join(part for item in payloads for part in (_COUNT.pack(len(item)), item))
        for rank in range(1, len(payloads)):
            self._send(rank, packed)
        return payloads

    def fail(self, message: str) -> None:
        """Tells the others that this rank has failed."""
        self._pass_on(f"rank {self.rank} failed: {message}")

    def explain(self, error: Exception) -> RankError:
        """Returns why tensors did not come through: what another rank says, else `error` itself."""
        try:
            for connection in wait(self._connections, _EXPLANATION_S):
                place = self._connections.index(connection)  # type: ignore[arg-type]
                self._receive(place + 1 if self.rank == 0 else 0)
        except RankError as reason:
            return reason
        return RankError(f"rank {self.rank} lost the others: {error}")

    def close(self) -> None:
        """Hangs up."""
        for connection in self._connections:
            connection.close()

    def _connection(self, rank: int) -> Connection:
        return self._connections[rank - 1 if self.rank == 0 else 0]

    def _send(self, rank: int, payload: bytes) -> None:
        try:
            self._connection(rank).send_bytes(_DATA + payload)
        except OSError:
            self._receive(rank)  # what it said before it went
            self._gone(rank)

    def _receive(self, rank: int) -> bytes:
        try:
            frame = self._connection(rank).recv_bytes()
        except (EOFError, OSError):
            self._gone(rank)
        if frame[:1] == _DATA:
            return frame[1:]
        self._fail_all(frame[1:].decode("utf-8"))

    def _gone(self, rank: int) -> NoReturn:
        self._fail_all(f"rank {rank} ended without a word, as if it was killed. Its log may say more.")

    def _fail_all(self, message: str) -> NoReturn:
        if self.rank == 0:
            self._pass_on(message)
        raise RankError(message)

    def _pass_on(self, message: str) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # one that is gone needs no word
                connection.send_bytes(_FAILURE + message.encode("utf-8"))


def _connection_over(client: socket.socket) -> Connection:
    """A connection of its own over an open socket."""
    # Else a frame of some 20 to 60 KB, sent as its length and the rest, waits 40 ms to be acknowledged.
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A host that loses its power says nothing; it is found out within these times, where the system has them.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            client.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(os.dup(client.fileno()))


def _admitted(client: socket.socket, key: bytes) -> tuple[int, Connection]:
    """Has a process that connected show the key, within `_HANDSHAKE_S` a message, and say its rank."""
    connection = _connection_over(client)
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _HANDSHAKE_S, 0))
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        (rank,) = _COUNT.unpack(connection.recv_bytes())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
    except BaseException:
        connection.close()
        raise
    return rank, connection


def _unpacked(packed: bytes) -> list[bytes]:
    payloads, start = [], 0
    while start < len(packed):
        (length,) = _COUNT.unpack_from(packed, start)
        start += _COUNT.size
        payloads.append(packed[start : start + length])
        start += length
    return payloads
