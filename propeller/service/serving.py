"""One exported model as it is served: requests become jobs, jobs batches, outputs of batches replies.

    admit -> next_batch -> done, failed or lost -> replies
                             +-> join in a thread -> joined -> reply

No sockets, threads, processes or Paddle here, and the clock is passed in.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from propeller.bundle import ArraySpec, Bundle
from propeller.errors import BadRequest, DeadlineExceeded, Overloaded, ServerError, ServiceError, WorkerDied
from propeller.service.batcher import Batch, Batcher, Counters
from propeller.service.frames import Array
from propeller.service.lanes import Job
from propeller.service.layout import Inputs, Layout
from propeller.service.plan import BatchLimits
from propeller.service.wire import Reply, Request

# What all requests that wait or run may hold, in messages of the largest size.
_MAX_HELD_MESSAGES = 16


@dataclass(eq=False)
class Ticket:
    """A request that was admitted and not answered yet.

    From the moment that all its rows are back it may wait for its answers to be joined.

    Attributes:
        number: tells it from all others of the server.
        client: whom to answer.
        request: what was asked, without its arrays.
        inputs: what is run.
        received, deadline: seconds on the clock.
        parts: what came back so far: (rows, outputs of these rows, answers for them).
        left: rows that did not come back yet.
    """

    number: int
    client: Hashable
    request: Request
    inputs: Inputs
    received: float
    deadline: float | None
    parts: list[tuple[list[int], Mapping[str, Array], Sequence[Any]]] = field(default_factory=list)
    left: int = 0

    @property
    def wants_answers(self) -> bool:
        """Whether the processor's answers are asked for, not the arrays."""
        return self.request.want == "answers"

    @property
    def answers(self) -> list[Any]:
        """What the processor made of the rows, in their order; of those that are back."""
        answers: list[Any] = [None] * len(self.inputs.lengths)
        for rows, _, part in self.parts:
            for row, answer in zip(rows, part, strict=True):
                answers[row] = answer
        return answers


@dataclass(frozen=True)
class Work:
    """A batch, ready to be sent to a worker.

    Attributes:
        batch: which rows of which jobs.
        arrays: the bundle's inputs, padded.
        finish: rows for which answers are wanted.
        outputs: whether any row's arrays are wanted.
    """

    batch: Batch
    arrays: dict[str, Array]
    finish: list[int]
    outputs: bool


# Requests that are complete, and their replies; None where that is still to be joined: see `Serving.done`.
Answered = list[tuple[Ticket, Reply | None]]


class Serving:
    """Everything the server knows of one bundle that it serves.

    Args:
        name: what clients call the model.
        bundle: the export.
        limits: of its batches.
        max_queue_rows, max_wait_s: see `Batcher`.
        max_message_bytes: the largest message that is taken.
        clock: seconds, never going back.

    Raises:
        ExportError: see `Layout`.
    """

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        limits: BatchLimits,
        *,
        max_queue_rows: int,
        max_wait_s: float,
        max_message_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.bundle = name, bundle
        self.layout = layout = Layout(name, bundle, max_queue_rows)
        self._batcher = Batcher(
            limits.max_tokens if layout.axis else limits.max_size,
            limits.max_size,
            max_queue_rows,
            max_wait_s,
            length_step=limits.length_step if layout.axis and layout.takes_padding else 1,
            max_length=bundle.axis_limits.get(layout.axis) if layout.axis else 1,
            batch_cost=limits.cost if layout.takes_padding else 0,
            clock=clock,
        )
        self._max_held_bytes = _MAX_HELD_MESSAGES * max_message_bytes
        self._numbers = itertools.count()
        self._clock = clock
        self._tickets: dict[int, Ticket] = {}
        self._running: dict[int, tuple[Batch, list[int]]] = {}  # by number, with the rows to finish
        self._joining: dict[int, Ticket] = {}  # by number
        self._held_bytes = self._preparing_rows = self._joining_rows = 0

    def reserve(self, request: Request, num_bytes: int) -> None:
        """Makes sure that there will be room for raw examples that are being prepared; `release` undoes it.

        Each counts as one row: how many windows it has is known when it is admitted. Rows whose answers are
        being joined count, too, so that no more is taken than can be joined.

        Args:
            request: of raw examples.
            num_bytes: of its message.

        Raises:
            Overloaded: there is none.
            BadRequest: there never is room for so many.
        """
        rows = len(request.raws or ())
        self._batcher.check_room(rows, reserved=self._preparing_rows + self._joining_rows)
        self._check_held(request, num_bytes)
        self._preparing_rows += rows
        self._held_bytes += num_bytes

    def release(self, request: Request, num_bytes: int) -> None:
        """Gives back what `reserve` took."""
        self._preparing_rows -= len(request.raws or ())
        self._held_bytes -= num_bytes

    def _check_held(self, request: Request, num_bytes: int) -> None:
        if self._held_bytes and self._held_bytes + num_bytes > self._max_held_bytes:
            raise Overloaded(
                f"requests of {self._held_bytes} bytes wait; try again later",
                self._batcher.wait_ms(),
                request_id=request.id,
            )

    def admit(self, client: Hashable, request: Request, inputs: Inputs, received: float) -> None:
        """Queues a request; each that is admitted is answered once, by one of the methods below.

        Args:
            client: whom to answer; clients take turns.
            request: what was asked.
            inputs: what `Layout.check` or `Layout.prepare` made of it.
            received: when it came, in seconds on the clock.

        Raises:
            Overloaded: the queue is full.
            BadRequest: a row that fits into no batch, or answers that the processor cannot give.
            DeadlineExceeded: its time is over already.
        """
        want = request.want or ("arrays" if request.raws is None else "answers")
        if want == "answers" and self.layout.processor is None:
            raise BadRequest(
                f"The model {self.name!r} was exported without a processor: it gives arrays, not answers.",
                request_id=request.id,
            )
        if want == "answers" and self.layout.joins and inputs.windows is None:
            raise BadRequest(
                f"The model {self.name!r} makes answers of raw examples and what it gives for their windows: "
                "send raws for them, or ask for arrays.",
                request_id=request.id,
            )
        self._check_held(request, inputs.num_bytes)
        deadline = None if request.deadline_ms is None else received + request.deadline_ms / 1000.0
        if deadline is not None and deadline <= self._clock():
            raise DeadlineExceeded("the time given to the request is over", request_id=request.id)
        bare = Request(request.id, request.kind, request.model, request.deadline_ms, want=want)
        ticket = Ticket(
            next(self._numbers), client, bare, inputs, received, deadline, left=len(inputs.lengths)
        )
        self._batcher.admit(Job(ticket.number, client, inputs.lengths, deadline))
        self._tickets[ticket.number] = ticket
        self._held_bytes += inputs.num_bytes

    def next_batch(self, idle_workers: int) -> Work | None:
        """Makes the next batch, if there is one; see `Batcher.next_batch`."""
        batch = self._batcher.next_batch(idle_workers)
        if batch is None:
            return None
        finish, outputs = [], False
        parts = []
        for job, places, rows in _groups(batch):
            ticket = self._tickets[job]
            parts.append((ticket.inputs.arrays, places, rows))
            if ticket.wants_answers:
                finish += places
            else:
                outputs = True
        self._running[batch.number] = batch, finish
        arrays = self.layout.pad(parts, len(batch.rows), batch.padded_length)
        return Work(batch, arrays, finish, outputs)

    def done(self, number: int, outputs: Mapping[str, Array], answers: Sequence[Any]) -> Answered:
        """Takes what a worker made of a batch.

        Args:
            number: the batch's.
            outputs: of all its rows; empty if nobody wanted them.
            answers: for the rows that were to be finished.

        Returns:
            The requests that are complete with this, and their replies; none if the batch had been put back.
            Where a reply is None the answers are to be made by `layout.join_answers` of the ticket's inputs
            and answers, which may take its time; then `joined` ends the request.
        """
        batch, finish = self._running.pop(number, (None, []))
        if batch is None or not self._batcher.finished(batch):
            return []
        by_place = dict(zip(finish, answers, strict=True))
        answered: Answered = []
        for job, places, rows in _groups(batch):
            ticket = self._tickets.get(job)
            if ticket is None:
                continue
            if ticket.wants_answers:
                ticket.parts.append((rows, {}, [by_place[place] for place in places]))
            else:
                ticket.parts.append((rows, {name: array[places] for name, array in outputs.items()}, ()))
            ticket.left -= len(rows)
            if ticket.left:
                continue
            if ticket.inputs.windows is not None:
                self._joining[ticket.number] = ticket
                self._joining_rows += len(ticket.inputs.lengths)
                answered.append((ticket, None))
            else:
                self._forget(ticket)
                answered.append((ticket, self._reply(ticket)))
        return answered

    def joined(self, ticket: Ticket, result: Sequence[Any] | ServiceError) -> Answered:
        """Takes the answers that were joined, or why there are none.

        Returns:
            The request with its reply; nothing if it has ended meanwhile.
        """
        if ticket.number not in self._joining:
            return []
        self._forget(ticket)
        if isinstance(result, ServiceError):
            return [(ticket, Reply(ticket.request.id, error=result))]
        return [(ticket, Reply(ticket.request.id, answers=result))]

    def failed(self, number: int, problem: str) -> Answered:
        """Takes note that a batch raised: its requests are tried alone; one that was alone has failed."""
        batch, _ = self._running.pop(number, (None, []))
        if batch is None:
            return []
        jobs = {job for job, _ in batch.rows}
        if len(jobs) > 1:
            lost = [job.id for job in self._batcher.requeue(batch)]
        else:
            lost = list(jobs) if self._batcher.finished(batch) else []
        return self._end(lost, ServerError(f"the model failed on this request: {problem}"))

    def lost(self, number: int, ran: bool = True) -> Answered:
        """Takes note that the worker of a batch died: its requests are tried once more, each alone.

        Args:
            number: the batch's.
            ran: False if the worker never got it, so that they are tried for the first time then.
        """
        batch, _ = self._running.pop(number, (None, []))
        if batch is None:
            return []
        lost = [job.id for job in self._batcher.requeue(batch, ran)]
        error = WorkerDied("the process that ran the request died, and so did the one that tried it again")
        return self._end(lost, error)

    def expired(self) -> Answered:
        """Answers the requests whose deadline passed before they were run."""
        expired = [job.id for job in self._batcher.expired()]
        error = DeadlineExceeded("the time given to the request was over before it could be run")
        return self._end(expired, error)

    def cancel(self, client: Hashable) -> int:
        """Drops the requests of a client that is gone; returns how many."""
        gone: list[Any] = [job.id for job in self._batcher.cancel(client)]
        gone += [number for number, ticket in self._joining.items() if ticket.client == client]
        for number in gone:
            self._forget(self._tickets[number])
        return len(gone)

    def has_work(self, client: Hashable) -> bool:
        """Whether a client waits for an answer."""
        joining = any(ticket.client == client for ticket in self._joining.values())
        return joining or self._batcher.has_jobs(client)

    def fail_all(self, error: ServiceError, *, joining: bool = True) -> Answered:
        """Answers all that is left with an error; what only waits to be joined, if `joining`."""
        return self._end([each for each in self._tickets if joining or each not in self._joining], error)

    def _end(self, numbers: Sequence[Any], error: ServiceError) -> Answered:
        answered: Answered = []
        for number in numbers:
            ticket = self._tickets.get(number)
            if ticket is not None:
                self._batcher.drop(number)
                self._forget(ticket)
                answered.append((ticket, Reply(ticket.request.id, error=error)))
        return answered

    def _forget(self, ticket: Ticket) -> None:
        del self._tickets[ticket.number]
        self._held_bytes -= ticket.inputs.num_bytes
        if self._joining.pop(ticket.number, None) is not None:
            self._joining_rows -= len(ticket.inputs.lengths)

    def _reply(self, ticket: Ticket) -> Reply:
        if ticket.wants_answers:
            return Reply(ticket.request.id, answers=ticket.answers)
        parts = [(rows, outputs) for rows, outputs, _ in ticket.parts]
        return Reply(ticket.request.id, tuple(self.layout.join(parts, ticket.inputs)))

    def wake_at(self, busy: bool) -> float | None:
        """When there may next be something to do; see `Batcher.wake_at`."""
        return self._batcher.wake_at(busy)

    @property
    def counters(self) -> Counters:
        """The queue's figures."""
        return self._batcher.counters

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits for an answer."""
        return not self._tickets and not self._preparing_rows

    def spec(self) -> dict[str, Any]:
        """What a client may want to know of the model."""
        bundle = self.bundle
        processor = bundle.metadata.get("processor")
        return {
            "inputs": [_described(spec) for spec in bundle.inputs],
            "outputs": [_described(spec) for spec in bundle.outputs],
            "axis_limits": dict(bundle.axis_limits),
            "processor": processor,
            "labels": (processor or {}).get("settings", {}).get("labels"),
            "metrics": bundle.metrics,
            "bundle": bundle.hash,
        }


def _described(spec: ArraySpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "axes": list(spec.axes),
        "pad_value": spec.pad_value,
        "max_value": spec.max_value,
    }


def _groups(batch: Batch) -> list[tuple[int, list[int], list[int]]]:
    """The rows of a batch by job: (job, places in the batch, rows of the job)."""
    groups: dict[Any, tuple[list[int], list[int]]] = {}
    for place, (job, row) in enumerate(batch.rows):
        places, rows = groups.setdefault(job, ([], []))
        places.append(place)
        rows.append(row)
    return [(job, places, rows) for job, (places, rows) in groups.items()]
