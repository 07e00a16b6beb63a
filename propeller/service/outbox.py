"""Requests of a client that are to be sent, or sent and not answered yet. No sockets; for any thread.

    add -> unsent -> sent -> answered
             ^         |
             +---------+  the connection was lost, or the server is full

An id stands for one sending only, so a late reply is never taken for another's.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import threading
import time

from propeller.errors import ConfigError, ServiceError
from propeller.service.frames import Frame, to_json
from propeller.service.wire import Reply, Request, encode_request

# What the server is not told of the time that is left, so that its DeadlineExceeded is here in time: a tenth,
# at most so many seconds.
_RETURN_S = 0.1


class Deadline:
    """When a call must have ended.

    Args:
        timeout: seconds from now; None for ever.

    Raises:
        ConfigError: it is not a finite number above 0.
    """

    def __init__(self, timeout: float | None):
        number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if timeout is not None and not (number and 0 < timeout < math.inf):
            raise ConfigError(
                f"timeout must be a finite number of seconds above 0, or None for ever; got {timeout!r}."
            )
        self.timeout = timeout
        self.at = math.inf if timeout is None else time.monotonic() + timeout

    @property
    def left(self) -> float | None:
        """Seconds that are left, at least 0; None for ever."""
        return None if self.timeout is None else max(0.0, self.at - time.monotonic())


class Call:
    """A request on its way.

    Args:
        request: its id and deadline are set whenever it is sent.
        deadline: when it must have ended.
        retry: send again what a full or ending server refused, or what was lost with the connection.

    Attributes:
        future: gives the reply, or raises what came in its place. Cancelling it ends the call.
        refusal: the last `Overloaded` or `Draining` that is being waited out.
        refusals: how many there were.
        sent_as: id of the last sending.

    Raises:
        BadRequest: it cannot be encoded.
    """

    def __init__(self, request: Request, deadline: Deadline, retry: bool):
        header, *self._payload = encode_request(request)
        self._header = json.loads(bytes(header))
        self.deadline, self.retry = deadline, retry
        self.future: concurrent.futures.Future[Reply] = concurrent.futures.Future()
        self.refusal: ServiceError | None = None
        self.refusals = 0
        self.sent_as = ""

    def frames(self, request_id: str) -> list[Frame]:
        """Returns the message as it is to be sent now."""
        left = self.deadline.left
        told = None if left is None else 1000.0 * (left - min(_RETURN_S, 0.1 * left))
        return [to_json({**self._header, "id": request_id, "deadline_ms": told}), *self._payload]

    def finish(self, result: Reply | Exception) -> None:
        """Hands the reply or the error on, unless nobody waits any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Outbox:
    """The calls that are neither answered nor given up. Who takes one out finishes it.

    Attributes:
        dropped: replies that nobody waited for.
    """

    def __init__(self) -> None:
        # Reentrant: a collection of garbage can run within any of the methods, and end calls.
        self._lock = threading.RLock()
        self._unsent: dict[Call, None] = {}
        self._sent: dict[str, Call] = {}
        self.dropped = 0

    def add(self, call: Call) -> None:
        """Puts a call behind those that are to be sent."""
        with self._lock:
            if not call.future.done():
                self._unsent[call] = None

    def first(self) -> Call | None:
        """Returns the call that is to be sent next; it stays until `was_sent`."""
        with self._lock:
            return next(iter(self._unsent), None)

    def was_sent(self, call: Call, request_id: str) -> None:
        """Notes under which id to expect the reply, unless the call was given up meanwhile."""
        with self._lock:
            if call in self._unsent:
                del self._unsent[call]
                self._sent[request_id] = call
                call.sent_as = request_id

    def forget(self, call: Call) -> bool:
        """Takes out a call that is given up; returns whether it had been sent."""
        with self._lock:
            self._unsent.pop(call, None)
            return self._sent.pop(call.sent_as, None) is not None

    def answered(self, request_id: str | None) -> Call | None:
        """Takes out the call that a reply is for; a reply that nobody waits for is counted."""
        with self._lock:
            call = self._sent.pop(request_id or "", None)
            self.dropped += call is None
            return call

    def awaits_replies(self) -> bool:
        """Whether something was sent and is not answered."""
        with self._lock:
            return bool(self._sent)

    def take_back(self) -> list[Call]:
        """What was sent on a connection that is lost is the next to be sent; returns what may not be."""
        with self._lock:
            lost = list(self._sent.values())
            self._sent.clear()
            self._unsent = {**{call: None for call in lost if call.retry}, **self._unsent}
            return [call for call in lost if not call.retry]

    def take_all(self) -> list[Call]:
        """Takes out all calls."""
        with self._lock:
            calls = [*self._sent.values(), *self._unsent]
            self._sent.clear()
            self._unsent.clear()
            return calls
