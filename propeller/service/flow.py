"""Requests of a stream of inputs: so many on their way, results in the order of the inputs. Never waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from propeller.errors import ServiceError
from propeller.service.outbox import Call, Deadline
from propeller.service.splitting import Part, Task, mismatch
from propeller.service.wire import Reply, Request

_END = object()


class _Running:
    """A task with what was sent of it and what came back."""

    def __init__(self, parts: Iterator[Part], join: Callable[[Sequence[Reply]], Any], deadline: Deadline):
        self.parts, self.join, self.deadline = parts, join, deadline
        self.all_sent = False
        self.calls: deque[tuple[Part, Call]] = deque()
        self.replies: list[Reply] = []
        self.error: ServiceError | None = None

    def fail(self, error: ServiceError) -> None:
        """Gives up what is on its way; the first error is the task's."""
        self.error, self.all_sent = error, True
        self.cancel()

    def cancel(self) -> None:
        for _, call in self.calls:
            call.future.cancel()
        self.calls.clear()


class Flow:
    """Reads inputs no faster than their requests are answered.

        while flow.advance():
            if (call := flow.expected) is None:
                yield flow.pop()
            else:
                flow.take(...)   # what came of the call

    Args:
        make: makes the task of an input.
        inputs: one for each result.
        send: sends a request that must be answered by a deadline.
        timeout: seconds that each input has, from its first request on; None for ever.
        max_in_flight: requests that are on their way at a time.
    """

    def __init__(
        self,
        make: Callable[[Any], Task],
        inputs: Iterable[Any],
        send: Callable[[Request, Deadline], Call],
        timeout: float | None,
        max_in_flight: int,
    ):
        self._make, self._inputs, self._send = make, iter(inputs), send
        self._timeout, self._limit = timeout, max_in_flight
        self._running: deque[_Running] = deque()

    def advance(self) -> bool:
        """Sends what there is room for; returns whether there is something to wait for or to `pop`."""
        num_calls = sum(len(task.calls) for task in self._running)
        while num_calls < self._limit and len(self._running) <= self._limit:
            if self._running and not self._running[-1].all_sent:
                num_calls += self._send_part(self._running[-1])
            elif not self._start():
                break
        return bool(self._running)

    @property
    def expected(self) -> Call | None:
        """The call that is to be waited for; None when the first result is complete."""
        calls = self._running[0].calls
        return calls[0][1] if calls else None

    def take(self, outcome: Reply | ServiceError) -> None:
        """Takes what came of the expected call."""
        task = self._running[0]
        part, _ = task.calls.popleft()
        problem = outcome if isinstance(outcome, ServiceError) else mismatch(outcome, part)
        if problem is not None:
            task.fail(problem)
        elif isinstance(outcome, Reply):
            task.replies.append(outcome)

    def pop(self) -> Any:
        """Returns the first result, or the `ServiceError` in its place."""
        task = self._running.popleft()
        if task.error is not None:
            return task.error
        try:
            return task.join(task.replies)
        except ServiceError as error:
            return error

    def close(self) -> None:
        """Gives up whatever is on its way."""
        for task in self._running:
            task.cancel()
        self._running.clear()

    def _start(self) -> bool:
        """Begins the next task; returns whether there is one."""
        given = next(self._inputs, _END)
        if given is _END:
            return False
        deadline = Deadline(self._timeout)
        try:
            task = self._make(given)
        except ServiceError as error:
            self._running.append(_Running(iter(()), list, deadline))
            self._running[-1].fail(error)
        else:
            self._running.append(_Running(task.parts, task.join, deadline))
        return True

    def _send_part(self, task: _Running) -> int:
        """Sends the next request of a task; returns by how many calls there are more."""
        num_calls = len(task.calls)
        try:
            part = next(task.parts, None)
            if part is None:
                task.all_sent = True
            else:
                task.calls.append((part, self._send(part.request, task.deadline)))
        except ServiceError as error:
            task.fail(error)
        return len(task.calls) - num_calls
