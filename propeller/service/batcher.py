"""The queue between requests and workers: jobs are admitted, batches of their rows handed out.

It is pure: no sockets, threads or Paddle, and the clock is passed in. A job goes one way:

    admit -> next_batch, once or more -> finished
                   ^                       or
                   +--------------------- requeue (its worker died)

and may end before that: `expired`, `cancel`, `drop`, and `requeue` for the second time. Which rows make a
batch is in `lanes.py`: clients take turns, and the one whose turn it is gets its oldest row into the batch.
So a client's oldest row waits for at most as many batches as there are clients, whatever the others queue.
Before it go only rows put back, and lanes that fill a batch by themselves, for no longer than `max_wait_s`.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from propeller.errors import BadRequest, ConfigError, Overloaded
from propeller.service.lanes import Entry, Job, Lanes, Plan, Row

__all__ = ["Batch", "Batcher", "Counters", "Job"]

# What a batch counts for in the measured rate, against the one after it: about the last 20 make it.
_RATE_DECAY = 0.95
# Jobs that are gone stay in the heap of deadlines until so many more than twice the live ones are in it.
_STALE_DEADLINES = 1024


@dataclass(frozen=True)
class Batch:
    """Rows to run together.

    Attributes:
        number: tells it from all other batches of the batcher.
        rows: (job id, index of the row in the job), the shortest row first.
        padded_length: what each row is padded to, in tokens.
        tokens: of all rows, before padding.
    """

    number: int
    rows: list[tuple[Hashable, int]]
    padded_length: int
    tokens: int


@dataclass(frozen=True)
class Counters:
    """What waits and runs now, and what has been handed out since the start (retried rows count twice)."""

    queued_rows: int
    running_rows: int
    batches: int
    rows: int
    tokens: int
    padded_tokens: int

    @property
    def padding_share(self) -> float:
        """The share of padding in all tokens handed out, 0 to 1."""
        return 1.0 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


@dataclass(frozen=True)
class _Picked:
    """The rows of a batch; `retried`: it is their second time."""

    rows: list[Row]
    padded_length: int
    retried: bool


@dataclass
class _Rate:
    """Rows finished per second while there was work, the latest counting most."""

    rows: float = 0.0
    seconds: float = 0.0
    since: float = 0.0

    def add(self, rows: int, now: float) -> None:
        self.rows = self.rows * _RATE_DECAY + rows
        self.seconds = self.seconds * _RATE_DECAY + now - self.since
        self.since = now

    def wait_ms(self, rows: int) -> float:
        """Returns how long so many rows take, at least 1; 0 before there is a measurement."""
        return max(1.0, math.ceil(1000.0 * rows * self.seconds / self.rows)) if self.rows else 0.0


class Batcher:
    """Admits jobs and hands out batches.

    Each row of an admitted job is handed out once, or once more if its worker dies. All times are in seconds
    on the clock.

    Args:
        max_batch_tokens: what rows times padded length of a batch may come to.
        max_batch_size: rows of a batch.
        max_queue_rows: rows that may wait.
        max_wait_s: how long a row waits for company while all workers are busy.
        length_step: lengths are rounded up to multiples of it ...
        max_length: ... but never above what the model takes; None: the token budget is the limit.
        batch_cost: what a batch costs beside its tokens, in tokens: with more, rows of less like length are
            put together. 0: only rows of one padded length.
        clock: the time, never going back.

    Raises:
        ConfigError: a limit that leaves no room for a row.
    """

    def __init__(
        self,
        max_batch_tokens: int,
        max_batch_size: int,
        max_queue_rows: int,
        max_wait_s: float,
        length_step: int = 16,
        max_length: int | None = None,
        batch_cost: int = 24,
        clock: Callable[[], float] = time.monotonic,
    ):
        max_length = max_batch_tokens if max_length is None else max_length
        sizes = (max_batch_tokens, max_batch_size, max_queue_rows, length_step, max_length)
        names = ("max_batch_tokens", "max_batch_size", "max_queue_rows", "length_step", "max_length")
        for name, value in zip(names, sizes, strict=True):
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1.")
        if not 0 <= max_wait_s < math.inf:
            raise ConfigError(f"max_wait_s is {max_wait_s}; expected a number of seconds, 0 or more.")
        if batch_cost < 0:
            raise ConfigError(f"batch_cost is {batch_cost}; expected a number of tokens, 0 or more.")
        self._max_length = min(max_length, max_batch_tokens)
        self._max_queue_rows, self._max_wait_s, self._step = max_queue_rows, max_wait_s, length_step
        self._clock = clock
        self._lanes = Lanes(max_batch_tokens, max_batch_size, batch_cost)
        self._jobs: dict[Hashable, Entry] = {}
        self._by_client: dict[Hashable, dict[int, Entry]] = {}
        self._retries: deque[_Picked] = deque()  # each of one job
        self._retry_rows = 0
        self._running: dict[int, _Picked] = {}  # by number of the batch
        self._running_rows = 0
        self._deadlines: list[tuple[float, int, Entry]] = []  # a heap
        self._expired: list[Job] = []
        self._rate = _Rate()
        self._admitted = self._batches = self._rows = self._tokens = self._padded_tokens = 0

    def admit(self, job: Job) -> None:
        """Takes a job in.

        Raises:
            BadRequest: it has no rows, more than can ever wait, a row that fits into no batch, or the id of
                another job that is not done.
            Overloaded: there is no room now; with the time until there is, at the rate measured of late.
        """
        self._check(job)
        count = len(job.lengths)
        self.check_room(count)
        rows: dict[int, deque[int]] = {}
        for index, length in enumerate(job.lengths):
            rows.setdefault(self._padded(length), deque()).append(index)
        entry = Entry(self._admitted, job, self._clock(), rows, queued=count, left=count)
        self._admitted += 1
        self._jobs[job.id] = entry
        self._by_client.setdefault(job.client, {})[entry.number] = entry
        self._lanes.add(entry)
        self._watch(entry)

    def check_room(self, rows: int, reserved: int = 0) -> None:
        """Checks that so many rows could be admitted now.

        Args:
            rows: of a job.
            reserved: rows that are to come before it.

        Raises:
            BadRequest: more than can ever wait.
            Overloaded: there is no room now.
        """
        if rows > self._max_queue_rows:
            raise BadRequest(
                f"the request has {rows} rows; expected at most {self._max_queue_rows}, which is "
                "all the queue takes. Send it in parts."
            )
        queued = self._lanes.rows + self._retry_rows + reserved
        over = queued + rows - self._max_queue_rows
        if over > 0:
            raise Overloaded(
                f"{queued} rows wait and the queue takes {self._max_queue_rows}, which leaves no room for "
                f"{rows} more; try again later",
                self.wait_ms(over),
            )

    def wait_ms(self, rows: int = 1) -> float:
        """Returns how long so many rows take, in milliseconds, at the rate measured of late; 0 if unknown."""
        return self._rate.wait_ms(rows)

    def next_batch(self, idle_workers: int = 0) -> Batch | None:
        """Hands out a batch: a full one at once, another if a worker idles or a row has waited `max_wait_s`.

        Args:
            idle_workers: workers that have nothing to do, the one for this batch included. What waits is
                spread over them.

        Returns:
            The batch; None if there is none yet.
        """
        now = self._expire()
        if self._retries:
            picked = self._retries.popleft()
            picked.rows[0][0].queued -= len(picked.rows)
            self._retry_rows -= len(picked.rows)
        else:
            plan = self._plan(now, idle_workers)
            if plan is None:
                return None
            picked = _Picked(self._lanes.take(plan), plan.padded_length, retried=False)
        if not self._running:
            self._rate.since = now  # the time without work tells nothing of the rate
        batch = Batch(
            self._batches,
            [(entry.job.id, index) for entry, index in picked.rows],
            picked.padded_length,
            sum(entry.job.lengths[index] for entry, index in picked.rows),
        )
        self._running[batch.number] = picked
        self._running_rows += len(batch.rows)
        self._batches += 1
        self._rows += len(batch.rows)
        self._tokens += batch.tokens
        self._padded_tokens += len(batch.rows) * batch.padded_length
        return batch

    def finished(self, batch: Batch) -> bool:
        """Takes note that a batch has been run.

        Returns:
            False if it was put back or finished before: these results are late and must not be used.
        """
        picked = self._running.pop(batch.number, None)
        if picked is None:
            return False
        self._running_rows -= len(picked.rows)
        self._rate.add(len(picked.rows), self._clock())
        for entry, _ in picked.rows:
            entry.left -= 1
            if not entry.left and not entry.gone:
                self._forget(entry)
        return True

    def requeue(self, batch: Batch, ran: bool = True) -> list[Job]:
        """Puts the rows of a batch whose worker died in front of all others, once.

        One of them may have killed it, so they go out again with none but the rows of their own job.

        Args:
            batch: what the worker had.
            ran: False if it never got it, which does not count as their first time.

        Returns:
            The jobs whose rows had their second time with this; they are dropped.
        """
        picked = self._running.pop(batch.number, None)
        if picked is None:
            return []
        self._running_rows -= len(picked.rows)
        rows_of: dict[Entry, list[Row]] = {}
        for row in picked.rows:
            if not row[0].gone:
                rows_of.setdefault(row[0], []).append(row)
        if picked.retried and ran:
            for entry in rows_of:
                self._drop(entry)
            return [entry.job for entry in rows_of]
        for entry, rows in rows_of.items():
            padded = self._padded(max(entry.job.lengths[index] for _, index in rows))
            self._retries.append(_Picked(rows, padded, retried=ran or picked.retried))
            self._retry_rows += len(rows)
            entry.queued += len(rows)
            self._watch(entry)
        return []

    def expired(self) -> list[Job]:
        """Returns the jobs that reached their deadline with rows not handed out yet; they are dropped.

        A job all of whose rows run is not among them. To be called regularly: it empties a list that
        `next_batch` adds to.
        """
        self._expire()
        expired, self._expired = self._expired, []
        return expired

    def cancel(self, client: Hashable) -> list[Job]:
        """Drops the jobs of a client that is gone, and returns them."""
        entries = list(self._by_client.get(client, {}).values())
        for entry in entries:
            self._drop(entry)
        return [entry.job for entry in entries]

    def has_jobs(self, client: Hashable) -> bool:
        """Whether a client has jobs that are not done."""
        return client in self._by_client

    def drop(self, job_id: Hashable) -> None:
        """Drops a job, since a row of it failed, say; does nothing if it has ended."""
        if job_id in self._jobs:
            self._drop(self._jobs[job_id])

    def wake_at(self, busy: bool = False) -> float | None:
        """Returns when `next_batch` or `expired` may next have something if nothing else happens.

        Args:
            busy: no worker can take a batch, so that only deadlines count.
        """
        while self._deadlines and not self._deadlines[0][2].queued:
            heapq.heappop(self._deadlines)[2].watched = False
        now, oldest = self._clock(), self._lanes.oldest()
        times = [deadline for deadline, _, _ in self._deadlines[:1]]
        if self._expired or (not busy and (self._retries or self._plan(now, 0) is not None)):
            times.append(now)
        elif oldest is not None and not busy:
            times.append(oldest + self._max_wait_s)
        return min(times, default=None)

    @property
    def counters(self) -> Counters:
        """The figures of this moment."""
        return Counters(
            queued_rows=self._lanes.rows + self._retry_rows,
            running_rows=self._running_rows,
            batches=self._batches,
            rows=self._rows,
            tokens=self._tokens,
            padded_tokens=self._padded_tokens,
        )

    def _plan(self, now: float, idle_workers: int) -> Plan | None:
        oldest = self._lanes.oldest()
        if oldest is None:
            return None
        plan = self._lanes.plan(idle_workers)
        if plan.full or idle_workers > 0 or oldest + self._max_wait_s <= now:
            return plan
        return self._lanes.full_lane()

    def _padded(self, length: int) -> int:
        return min(-(-length // self._step) * self._step, self._max_length)

    def _check(self, job: Job) -> None:
        if not job.lengths:
            raise BadRequest("the request has no rows; expected at least one")
        shortest, longest = min(job.lengths), max(job.lengths)
        if shortest < 1:
            raise BadRequest(f"row {job.lengths.index(shortest)} has {shortest} tokens; expected at least 1")
        if longest > self._max_length:
            raise BadRequest(
                f"row {job.lengths.index(longest)} has {longest} tokens; expected at most "
                f"{self._max_length}, since a longer one fits into no batch"
            )
        if job.id in self._jobs:
            raise BadRequest(f"the id {job.id!r} is that of a request not done yet; expected a new one")

    def _drop(self, entry: Entry) -> None:
        waiting = sum(map(len, entry.rows.values()))
        if entry.queued > waiting:
            self._retries = deque(picked for picked in self._retries if picked.rows[0][0] is not entry)
            self._retry_rows -= entry.queued - waiting
        self._lanes.remove(entry)
        entry.queued = 0
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        entry.gone = True
        del self._jobs[entry.job.id]
        jobs = self._by_client[entry.job.client]
        del jobs[entry.number]
        if not jobs:
            del self._by_client[entry.job.client]

    def _watch(self, entry: Entry) -> None:
        """Has the deadline of a job watched as long as rows of it are queued."""
        if entry.job.deadline is None or entry.watched:
            return
        entry.watched = True
        heapq.heappush(self._deadlines, (entry.job.deadline, entry.number, entry))
        if len(self._deadlines) > 2 * len(self._jobs) + _STALE_DEADLINES:
            self._deadlines = [item for item in self._deadlines if not item[2].gone]
            heapq.heapify(self._deadlines)

    def _expire(self) -> float:
        """Drops the jobs whose time is over; returns the time."""
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)[2]
            entry.watched = False
            if entry.queued:
                self._drop(entry)
                self._expired.append(entry.job)
        return now
