"""A client's connection: one background thread, which alone touches the sockets.

The thread starts with the first request and sleeps while there is nothing to do. It connects only when
something is to be sent.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import os
import random
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import zmq

from propeller.errors import Draining, Overloaded, PropellerError, ServiceError, Unavailable
from propeller.service.backoff import Backoff
from propeller.service.client_link import Link, State, resolve
from propeller.service.frames import Frame
from propeller.service.outbox import Call, Deadline, Outbox
from propeller.service.wire import Request, decode_reply

log = logging.getLogger("propeller")

# Lowest and highest pause between attempts to connect, and before a full or ending server is asked again.
_RECONNECT_S = (0.05, 1.0)
_RETRY_S = (0.01, 2.0)
_JITTER = 0.25
# Replies read before the thread looks at what else there is to do.
_REPLIES_A_TURN = 64
_JOIN_S = 5.0


class Connection:
    """Calls of any number of threads to one server. It belongs to its process: a fork makes its own.

    Args:
        address: `tcp://host:port` or `ipc://path`.
        curve_keys: folder of the client's keys, or None.
    """

    def __init__(self, address: str, curve_keys: str | Path | None):
        self.address, self.curve_keys = address, curve_keys
        self.outbox = Outbox()
        self.condition = Condition()
        self._pid = os.getpid()
        # Reentrant: a collection of garbage can close the connection within any of the methods.
        self._lock = threading.RLock()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._bell: Bell | None = None

    def send(self, request: Request, deadline: Deadline, retry: bool) -> Call:
        """Sends a request as soon as there is a connection.

        Args:
            request: without id and deadline.
            deadline: when it must have ended.
            retry: see `Call`.

        Raises:
            BadRequest: it cannot be encoded.
            Unavailable: the connection was closed.
        """
        call = Call(request, deadline, retry)
        with self._lock:
            if self._closed:
                raise Unavailable("The client was closed. Make a new one.")
            if self._thread is None:
                self._bell = Bell()
                self._thread = threading.Thread(
                    target=self._run, args=(self._bell,), name="propeller-client", daemon=True
                )
                self._thread.start()
            self.outbox.add(call)
            self._ring()
        call.future.add_done_callback(lambda _: self._forget(call))
        return call

    def unanswered(self, call: Call) -> ServiceError:
        """Returns why a call was not answered in time."""
        if call.refusal is not None:
            return call.refusal
        return Unavailable(
            f"No answer from {self.address} within {call.deadline.timeout:g} s: {self.condition}."
        )

    def close(self, wait: bool = True) -> None:
        """Ends the thread; what is unanswered fails.

        Args:
            wait: until the thread has ended.
        """
        with self._lock if self._pid == os.getpid() else contextlib.nullcontext():
            self._closed = True
            thread, bell = self._thread, self._bell
            if self._pid == os.getpid():
                self._ring()
            elif bell is not None:
                bell.close()  # only this process's copies: the thread is the parent's
        if wait and self._pid == os.getpid() and thread not in (None, threading.current_thread()):
            thread.join(_JOIN_S)

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    def _forget(self, call: Call) -> None:
        if self.outbox.forget(call):
            with self._lock:
                self._ring()  # a link that is to be left may have waited for just this reply

    def _run(self, bell: Bell) -> None:
        """The thread. However it ends, nobody is left waiting."""
        problem = "the client was closed"
        try:
            with contextlib.closing(_Loop(self, bell)) as loop:
                while not self._closed:
                    loop.turn()
        except Exception as error:
            problem = f"its thread failed ({error!r})"
            log.exception("The thread of a client of %s failed.", self.address)
        finally:
            with self._lock:
                self._thread = self._bell = None
                bell.close()
                calls = self.outbox.take_all()
            for call in calls:
                call.finish(Unavailable(f"No answer from {self.address}: {problem}."))


class Condition:
    """How the connection is, for the message of a call that was not answered.

    Attributes:
        ready: there is a connection now.
        was_ready: there has been one.
        problem: why there is none.
    """

    def __init__(self) -> None:
        self.ready = self.was_ready = False
        self.problem = "there was no time for it"

    def __str__(self) -> str:
        if self.ready:
            return "the connection stands, but the answer takes longer. Give a longer timeout or fewer rows"
        if self.was_ready:
            return f"the connection was lost and could not be made again ({self.problem})"
        return f"there never was a connection ({self.problem}). Check the address and the server"


class Bell:
    """Wakes the thread from its sleep on sockets."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)
        self.fd = self._near.fileno()

    def ring(self) -> None:
        """Makes `fd` readable."""
        with contextlib.suppress(BlockingIOError):  # it rings already, and very loud
            self._far.send(b"!")

    def stop(self) -> None:
        """Makes `fd` unreadable; what was rung for must be looked at after that."""
        with contextlib.suppress(BlockingIOError):
            self._near.recv(4096)

    def close(self) -> None:
        """Gives back both ends."""
        self._near.close()
        self._far.close()


class _Loop:
    """What the thread does, and all that only the thread may touch."""

    def __init__(self, connection: Connection, bell: Bell):
        self._address, self._curve_keys = connection.address, connection.curve_keys
        self._outbox, self._condition = connection.outbox, connection.condition
        self._unanswered = connection.unanswered
        self._bell = bell
        # Nothing else refers to it, so that a fork never comes to close what is its parent's.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link: Link | None = None
        self._leaving = False
        self._blocked = False
        self._endpoints: list[str] = []
        self._backoff = Backoff(*_RECONNECT_S)
        self._next_attempt = 0.0
        self._refused: list[tuple[float, int, Call]] = []
        # The first of the calls that were lost with a connection, until there is a reply. Meanwhile one is
        # sent at a time, so that what makes the server hang up is told from its neighbours.
        self._suspect: Call | None = None
        self._numbers = itertools.count(1)
        self._poller = self._new_poller()

    def close(self) -> None:
        """Gives back all that zmq has."""
        self._ask_again(math.inf)
        if self._link is not None:
            self._link.close()
        self._context.destroy(linger=0)

    def turn(self) -> None:
        """Waits until there is something to do and does it."""
        events = dict(self._poller.poll(self._sleep_ms()))
        if self._bell.fd in events:
            self._bell.stop()
        link = self._link
        if link is not None and link.socket in events:
            self._receive(link)
        if link is not None and link.monitor in events:
            self._look_at(link)
        now = time.monotonic()
        self._ask_again(now)
        if self._leaving and not self._outbox.awaits_replies():
            self._drop_link()
            self._pause()
        if self._link is None and now >= self._next_attempt and self._outbox.first() is not None:
            self._connect()
        if self._link is not None and not self._leaving:
            self._send(self._link)

    def _sleep_ms(self) -> int | None:
        """Until the next thing that comes by itself; None if nothing does."""
        times = [self._refused[0][0]] if self._refused else []
        if self._link is None and self._outbox.first() is not None:
            times.append(self._next_attempt)
        return max(0, math.ceil(1000.0 * (min(times) - time.monotonic()))) if times else None

    def _new_poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._bell.fd, zmq.POLLIN)
        return poller

    def _connect(self) -> None:
        """Opens a link to the next address of the host."""
        try:
            self._endpoints = self._endpoints or resolve(self._address)
            self._link = Link(self._context, self._endpoints.pop(0), self._curve_keys)
        except OSError as error:
            self._condition.problem = f"the name cannot be resolved: {error}"
            self._pause()
        except (zmq.ZMQError, PropellerError) as error:
            self._fail_all(str(error))
        else:
            self._poller.register(self._link.socket, zmq.POLLIN)
            self._poller.register(self._link.monitor, zmq.POLLIN)

    def _pause(self) -> None:
        self._next_attempt = time.monotonic() + self._backoff.next()

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link, self._leaving, self._blocked = None, False, False
        self._condition.ready = False
        self._poller = self._new_poller()

    def _look_at(self, link: Link) -> None:
        """Acts on what has become of the link."""
        before, state = link.state, link.update()
        self._condition.problem = link.problem
        if state is before:
            return
        if state is State.READY:
            self._condition.ready = self._condition.was_ready = True
            self._backoff.reset()
            self._endpoints = []
        elif state is State.REFUSED:
            self._drop_link()
            self._endpoints = []
            self._fail_all(link.problem)
        else:
            while self._receive(link):
                pass
            self._drop_link()
            self._take_back()
            if not self._endpoints:
                self._pause()

    def _take_back(self) -> None:
        """Has what was lost with the connection sent again, but not what a connection was lost with twice."""
        anything_lost = self._outbox.awaits_replies()
        for call in self._outbox.take_back():
            call.finish(Unavailable(f"The connection to {self._address} was lost. Send it again."))
        first = self._outbox.first()
        if not anything_lost or first is None or not first.sent_as:
            return
        if first is self._suspect:
            num_bytes = sum(memoryview(frame).nbytes for frame in first.frames(first.sent_as))
            self._outbox.forget(first)
            first.finish(
                Unavailable(
                    f"{self._address} hung up twice on this request of {num_bytes} bytes. It does so when "
                    "one is larger than it takes (--max-message-mb), or when it ends; its log says which."
                )
            )
            first = None
        self._suspect = first

    def _fail_all(self, problem: str) -> None:
        self._ask_again(math.inf)
        for call in self._outbox.take_all():
            call.finish(Unavailable(f"No connection to {self._address}: {problem}."))

    def _send(self, link: Link) -> None:
        """Sends what there is and there is room for."""
        blocked = False
        while link.state is State.READY and not blocked and (call := self._outbox.first()) is not None:
            if self._suspect is not None and self._outbox.awaits_replies():
                break
            if call.deadline.left == 0.0:
                self._outbox.forget(call)
                call.finish(self._unanswered(call))
                continue
            request_id = str(next(self._numbers))
            blocked = not link.send(call.frames(request_id))
            if not blocked:
                self._outbox.was_sent(call, request_id)
        if blocked is not self._blocked:
            self._blocked = blocked
            self._poller.modify(link.socket, zmq.POLLIN | zmq.POLLOUT if blocked else zmq.POLLIN)

    def _receive(self, link: Link) -> bool:
        """Reads replies, so many at most; returns whether there may be more."""
        for _ in range(_REPLIES_A_TURN):
            frames = link.receive()
            if frames is None:
                return False
            self._take(frames)
        return True

    def _take(self, frames: Sequence[Frame]) -> None:
        """Hands a reply to whom it is for."""
        self._suspect = None
        try:
            reply = decode_reply(frames)
        except ServiceError as error:
            call = self._outbox.answered(error.request_id)
            if call is not None:
                call.finish(error)
            return
        call = self._outbox.answered(reply.id)
        if isinstance(reply.error, Draining):
            self._leaving = True  # whoever takes its place listens at the same address
        if call is not None and not self._waits_out(call, reply.error):
            call.finish(reply.error or reply)

    def _waits_out(self, call: Call, error: ServiceError | None) -> bool:
        """Whether a call is sent again later instead of raising the error."""
        if not call.retry or not isinstance(error, Overloaded | Draining):
            return False
        low, high = _RETRY_S
        wait = error.retry_after_ms / 1000.0 if isinstance(error, Overloaded) else 0.0
        wait = wait if wait > 0.0 else low * 2.0 ** min(call.refusals, 16)
        wait = max(low, min(wait, high)) * random.uniform(1.0, 1.0 + _JITTER)
        if time.monotonic() + wait >= call.deadline.at:
            return False
        call.refusal, call.refusals = error, call.refusals + 1
        heapq.heappush(self._refused, (time.monotonic() + wait, next(self._numbers), call))
        return True

    def _ask_again(self, now: float) -> None:
        """Puts back the calls that have waited long enough."""
        while self._refused and self._refused[0][0] <= now:
            self._outbox.add(heapq.heappop(self._refused)[2])
