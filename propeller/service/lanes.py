"""The rows that wait for a worker, and which of them make the next batch; `batcher.py` has the rest.

A row of `length` tokens, rounded up to a multiple of some step, waits in the lane of that length. A batch is
seeded by the oldest row of the client whose turn it is; within a lane, too, clients take turns. With it go
rows of like length, as many as make the most of the batch: its worth are the tokens of its lanes, its price
the same after padding, and what any batch costs.

A row costs O(1) to add and to take, a batch a look at some dozens of lanes, however many rows wait.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """A request, as the queue sees it.

    Attributes:
        id: tells it from all other jobs in the batcher.
        client: who asks; clients take turns.
        lengths: tokens of each row, before padding.
        deadline: when its answer is of no use any more, in seconds on the batcher's clock; None: never.
    """

    id: Hashable
    client: Hashable
    lengths: Sequence[int]
    deadline: float | None = None


@dataclass(eq=False)
class Entry:
    """A job in the batcher.

    Attributes:
        number: counts up from job to job.
        job: what was asked.
        admitted: when, in seconds.
        rows: the indices of the rows in lanes, by padded length, each in order.
        queued: rows not handed out, or put back.
        left: rows not finished.
        watched: its deadline is being watched.
        gone: it is done or dropped.
    """

    number: int
    job: Job
    admitted: float
    rows: dict[int, deque[int]]
    queued: int
    left: int
    watched: bool = False
    gone: bool = False

    def oldest_lane(self) -> int:
        """Returns the padded length of the first row that waits in a lane."""
        return min(self.rows, key=lambda padded: self.rows[padded][0])


# Lanes above the seed's that are tried as the longest of a batch.
_MAX_LANES = 32
# A row: the job it belongs to, and its index there.
Row = tuple[Entry, int]


@dataclass
class _Turns:
    """Jobs by client: clients take turns, the jobs of one go in order.

    Ordered dictionaries, since the first key of a plain one costs a walk over all that were deleted before.
    """

    clients: OrderedDict[Hashable, OrderedDict[int, Entry]] = field(default_factory=OrderedDict)

    def add(self, entry: Entry) -> None:
        self.clients.setdefault(entry.job.client, OrderedDict())[entry.number] = entry

    def remove(self, entry: Entry) -> None:
        jobs = self.clients[entry.job.client]
        del jobs[entry.number]
        if not jobs:
            del self.clients[entry.job.client]

    def first(self) -> Entry:
        """Returns the first job of the client whose turn it is."""
        return next(iter(next(iter(self.clients.values())).values()))

    def next(self) -> Entry:
        """Returns the first job of the client whose turn it is, and passes the turn on."""
        entry = self.first()
        self.pass_on(entry.job.client)
        return entry

    def pass_on(self, client: Hashable) -> None:
        """Puts a client behind all others."""
        if client in self.clients:
            self.clients.move_to_end(client)


@dataclass
class _Lane(_Turns):
    """The jobs with rows of one padded length."""

    rows: int = 0


@dataclass(frozen=True)
class Plan:
    """What the next batch is made of.

    Attributes:
        parts: (lane, rows to take out of it), the seed's first.
        in_turn: the seed is the oldest row of the client whose turn it is; else any of that lane.
        full: no row more would fit.
    """

    parts: list[tuple[int, int]]
    in_turn: bool
    full: bool

    @property
    def padded_length(self) -> int:
        """What the rows are padded to."""
        return max(lane for lane, _ in self.parts)


class Lanes:
    """The rows that wait.

    Args:
        max_tokens: what rows times padded length of a batch may come to.
        max_rows: rows of a batch.
        batch_cost: what a batch costs beside its tokens, in tokens. The higher, the more padding is taken
            for fewer batches; with 0 only rows of one lane go together.
    """

    def __init__(self, max_tokens: int, max_rows: int, batch_cost: int):
        self.rows = 0
        self._tokens = 0  # of these rows, padded
        self._max_tokens, self._max_rows, self._batch_cost = max_tokens, max_rows, batch_cost
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._turns = _Turns()
        self._lanes: dict[int, _Lane] = {}
        self._lengths: list[int] = []  # the keys of the lanes, sorted

    def add(self, entry: Entry) -> None:
        """Takes in the rows of a new job."""
        self._entries[entry.number] = entry
        self._turns.add(entry)
        for padded, indices in entry.rows.items():
            lane = self._lanes.get(padded)
            if lane is None:
                lane = self._lanes[padded] = _Lane()
                insort(self._lengths, padded)
            lane.add(entry)
            lane.rows += len(indices)
            self.rows += len(indices)
            self._tokens += padded * len(indices)

    def remove(self, entry: Entry) -> None:
        """Takes out all rows of a job that are still here."""
        for padded in list(entry.rows):
            count = len(entry.rows[padded])
            entry.rows[padded].clear()
            self._leave(entry, padded, count)

    def oldest(self) -> float | None:
        """Returns when the oldest job that waits was admitted; None if none waits."""
        return next(iter(self._entries.values())).admitted if self._entries else None

    def plan(self, idle_workers: int) -> Plan:
        """Plans the batch of the client whose turn it is. There must be a row.

        Args:
            idle_workers: so many workers share what waits, so that none of them stays without.
        """
        seed = self._turns.first().oldest_lane()
        tokens = self._max_tokens
        if idle_workers > 1:
            tokens = min(tokens, max(seed, math.ceil(self._tokens / idle_workers)))
        here = bisect_left(self._lengths, seed)
        windows = []
        for high in range(here, min(here + _MAX_LANES, len(self._lengths))):
            window = self._window(here, high, tokens)
            if window is None:
                break
            windows.append(window)
        return max(windows, key=lambda window: window[1])[0]  # of equals the first, with the least padding

    def _window(self, here: int, high: int, tokens: int) -> tuple[Plan, float] | None:
        """Plans a batch whose longest rows are those of lane number `high`, with its worth by its price.

        It has all rows of the lanes above the seed's, number `here`, and below that what raises its worth by
        its price. None if there is no room for the seed.
        """
        top = self._lengths[high]
        room = self._capacity(top, tokens)
        above = [(lane, self._lanes[lane].rows) for lane in self._lengths[here + 1 : high + 1]]
        rows = sum(count for _, count in above)
        if rows >= room:
            return None
        worth = sum(lane * count for lane, count in above)
        parts: list[tuple[int, int]] = []
        for place in range(here, -1, -1):
            lane = self._lengths[place]
            pays = lane * (self._batch_cost + rows * top) > worth * top
            if rows == room or (place < here and not pays):
                break
            count = min(self._lanes[lane].rows, room - rows)
            parts.append((lane, count))
            rows += count
            worth += count * lane
        plan = Plan([parts[0], *above, *parts[1:]], in_turn=True, full=rows == room)
        return plan, worth / (self._batch_cost + rows * top)

    def full_lane(self) -> Plan | None:
        """Plans a batch of a lane that fills one by itself, whoever's turn it is; None if there is none."""
        for padded in self._lengths:
            capacity = self._capacity(padded, self._max_tokens)
            if self._lanes[padded].rows >= capacity:
                return Plan([(padded, capacity)], in_turn=False, full=True)
        return None

    def take(self, plan: Plan) -> list[Row]:
        """Takes the rows of a plan out of the lanes.

        Returns:
            The rows, the shortest first, those of a client that have one length in their order.
        """
        rows = []
        counts = dict(plan.parts)
        if plan.in_turn:  # rows of others may stand before the seed in its lane
            seed, padded = self._turns.next(), plan.parts[0][0]
            self._lanes[padded].pass_on(seed.job.client)
            rows.append(self._take(seed, padded))
            counts[padded] -= 1
        for padded, count in counts.items():
            for _ in range(count):
                rows.append(self._take(self._lanes[padded].next(), padded))
        return sorted(rows, key=lambda row: row[0].job.lengths[row[1]])

    def _take(self, entry: Entry, padded: int) -> Row:
        index = entry.rows[padded].popleft()
        entry.queued -= 1
        self._leave(entry, padded, 1)
        return entry, index

    def _leave(self, entry: Entry, padded: int, count: int) -> None:
        """Counts rows out that a job no longer has in a lane, and forgets what is empty then."""
        lane = self._lanes[padded]
        lane.rows -= count
        self.rows -= count
        self._tokens -= count * padded
        if entry.rows[padded]:
            return
        del entry.rows[padded]
        lane.remove(entry)
        if not lane.rows:
            del self._lanes[padded]
            del self._lengths[bisect_left(self._lengths, padded)]
        if not entry.rows:
            self._turns.remove(entry)
            del self._entries[entry.number]

    def _capacity(self, padded: int, tokens: int) -> int:
        return min(self._max_rows, tokens // padded)
