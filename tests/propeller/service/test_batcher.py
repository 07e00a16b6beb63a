"""The queue: what it promises under any order of events, and each of its rules by itself."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from propeller.errors import BadRequest, ConfigError, Overloaded
from propeller.service.batcher import Batcher, Job

MAX_TOKENS, MAX_ROWS, MAX_QUEUE, MAX_WAIT_S, STEP, MAX_LENGTH = 256, 8, 60, 0.5, 16, 100
QUICK = settings(derandomize=True, max_examples=100, deadline=None)


class Clock:
    """Time that goes on when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(clock):
    """Makes a batcher; its limits can be changed."""

    def make(**changed):
        limits = {
            "max_batch_tokens": MAX_TOKENS,
            "max_batch_size": MAX_ROWS,
            "max_queue_rows": 10_000,
            "max_wait_s": MAX_WAIT_S,
            "length_step": STEP,
        }
        return Batcher(**{**limits, **changed}, clock=clock)

    return make


def drain(batcher, idle_workers=1):
    """Returns all batches there are, each finished before the next."""
    batches = []
    while (batch := batcher.next_batch(idle_workers)) is not None:
        assert batcher.finished(batch)
        batches.append(batch)
    return batches


def ids(batch):
    return [job_id for job_id, _ in batch.rows]


class Story(RuleBasedStateMachine):
    """Anything may happen in any order; `waiting` and `running` are what must be in the batcher."""

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.batcher = Batcher(
            MAX_TOKENS, MAX_ROWS, MAX_QUEUE, MAX_WAIT_S, STEP, MAX_LENGTH, clock=self.clock
        )
        self.jobs = {}  # live, by id, in order of admission
        self.waiting = {}  # (id, index) -> whether it has run once
        self.running = {}  # number of a batch -> (batch, whether it is a second time)
        self.past = []
        self.admitted = 0

    def end(self, job):
        del self.jobs[job.id]
        self.waiting = {row: again for row, again in self.waiting.items() if row[0] != job.id}

    @rule(
        client=st.integers(0, 3),
        lengths=st.lists(st.integers(0, 40) | st.integers(0, MAX_LENGTH + 1), max_size=30),
        seconds=st.none() | st.floats(-0.1, 2),
    )
    def admit(self, client, lengths, seconds):
        deadline = None if seconds is None else self.clock.now + seconds
        job = Job(self.admitted, client, lengths, deadline)
        self.admitted += 1
        if not lengths or min(lengths) < 1 or max(lengths) > MAX_LENGTH:
            with pytest.raises(BadRequest):
                self.batcher.admit(job)
        elif len(self.waiting) + len(lengths) > MAX_QUEUE:
            with pytest.raises(Overloaded) as caught:
                self.batcher.admit(job)
            assert caught.value.retry_after_ms >= 0
        else:
            self.batcher.admit(job)
            self.jobs[job.id] = job
            self.waiting.update({(job.id, index): False for index in range(len(lengths))})

    @rule(idle_workers=st.integers(0, 3))
    def next_batch(self, idle_workers):
        self.expired()
        wake_at = self.batcher.wake_at()
        batch = self.batcher.next_batch(idle_workers)
        if batch is None:
            assert not (idle_workers and self.waiting)
            assert wake_at is None or wake_at > self.clock.now
            return
        if not idle_workers:
            assert wake_at <= self.clock.now
        self.check_budget(batch)
        again = {self.waiting[row] for row in batch.rows}
        assert len(again) == 1 and len(set(batch.rows)) == len(batch.rows)
        if again == {True}:
            assert len(set(ids(batch))) == 1  # one that may have killed a worker meets nobody
        else:
            assert not any(self.waiting.values())  # those put back go first
            self.check_order(batch)
        for row in batch.rows:
            del self.waiting[row]
        self.running[batch.number] = batch, again == {True}

    def length(self, row):
        return self.jobs[row[0]].lengths[row[1]]

    def check_budget(self, batch):
        lengths = list(map(self.length, batch.rows))
        assert lengths == sorted(lengths)
        assert batch.tokens == sum(lengths)
        assert lengths[-1] <= batch.padded_length < lengths[-1] + STEP
        assert batch.padded_length % STEP == 0 or batch.padded_length == MAX_LENGTH
        assert len(lengths) <= MAX_ROWS and len(lengths) * batch.padded_length <= MAX_TOKENS

    def check_order(self, batch):
        taken = set()
        for row in batch.rows:
            same = [
                other
                for other in self.waiting
                if self.jobs[other[0]].client == self.jobs[row[0]].client
                and self.length(other) == self.length(row)
                and other not in taken
            ]
            assert row == min(same)
            taken.add(row)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finished(self, data):
        batch, _ = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        assert self.batcher.finished(batch)
        self.past.append(batch)
        self.forget_done(batch)

    def forget_done(self, batch):
        left = {job_id for job_id, _ in self.waiting}
        left |= {job_id for other, _ in self.running.values() for job_id in ids(other)}
        for job_id in set(ids(batch)) - left:
            self.jobs.pop(job_id, None)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def worker_died(self, data):
        batch, again = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        self.past.append(batch)
        alive = [row for row in batch.rows if row[0] in self.jobs]
        lost = self.batcher.requeue(batch)
        if again:
            assert {job.id for job in lost} == {job_id for job_id, _ in alive}
            for job in lost:
                self.end(job)
        else:
            assert not lost
            self.waiting.update(dict.fromkeys(alive, True))

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def late(self, data):
        batch = data.draw(st.sampled_from(self.past))
        assert not self.batcher.finished(batch)
        assert self.batcher.requeue(batch) == []

    @rule(seconds=st.sampled_from([0.0, 0.1, MAX_WAIT_S, 1.0]))
    def time_goes_on(self, seconds):
        self.clock.now += seconds

    @rule()
    def expired(self):
        queued = {job_id for job_id, _ in self.waiting}
        over = {
            job_id
            for job_id in queued
            if self.jobs[job_id].deadline is not None and self.jobs[job_id].deadline <= self.clock.now
        }
        expired = self.batcher.expired()
        assert len(expired) == len(over) and {job.id for job in expired} == over
        for job in expired:
            self.end(job)

    @rule(client=st.integers(0, 3))
    def cancel(self, client):
        self.expired()
        mine = [job for job in self.jobs.values() if job.client == client]
        assert self.batcher.cancel(client) == mine
        for job in mine:
            self.end(job)

    @rule(job_id=st.integers(0, 50))
    def drop(self, job_id):
        self.batcher.drop(job_id)
        if job_id in self.jobs:
            self.end(self.jobs[job_id])

    @invariant()
    def counted(self):
        counters = self.batcher.counters
        assert counters.queued_rows == len(self.waiting)
        assert counters.running_rows == sum(len(batch.rows) for batch, _ in self.running.values())
        assert 0.0 <= counters.padding_share < 1.0

    @invariant()
    def wakes_for_deadlines(self):
        deadlines = [self.jobs[job_id].deadline for job_id, _ in self.waiting]
        expected = min((deadline for deadline in deadlines if deadline is not None), default=None)
        assert self.batcher.wake_at(busy=True) == expected

    def teardown(self):
        for batch, _ in self.running.values():
            assert self.batcher.finished(batch)
        self.running = {}
        self.expired()
        left = sorted(row for batch in drain(self.batcher) for row in batch.rows)
        assert left == sorted(self.waiting)
        assert self.batcher.wake_at() is None


Story.TestCase.settings = settings(derandomize=True, max_examples=200, stateful_step_count=50, deadline=None)
TestStory = Story.TestCase


REQUESTS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=20)), max_size=20
)


@QUICK
@given(REQUESTS, st.integers(0, 3))
def test_the_same_requests_make_the_same_batches(requests, idle_workers):
    def run():
        clock = Clock()
        batcher = Batcher(MAX_TOKENS, MAX_ROWS, 1000, MAX_WAIT_S, STEP, clock=clock)
        batches = []
        for number, (client, lengths) in enumerate(requests):
            batcher.admit(Job(str(number), str(client), lengths))
            batches.append(batcher.next_batch(idle_workers))
            clock.now += 0.1
        return batches + drain(batcher)

    assert run() == run()


@QUICK
@given(REQUESTS, st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=10), st.integers(1, 5))
def test_nobody_starves_beside_a_flood(requests, lengths, hogs):
    batcher = Batcher(MAX_TOKENS, MAX_ROWS, 10**6, MAX_WAIT_S, STEP, clock=Clock())
    for number, (client, rows) in enumerate(requests):
        batcher.admit(Job(number, client, rows))
    mine = [length for client, rows in requests if client == 0 for length in rows] + lengths
    batcher.admit(Job("mine", 0, lengths))
    left = {("mine", index) for index in range(len(lengths))}
    for turn in range(len(mine) * (4 + hogs)):
        for hog in range(hogs):
            batcher.admit(Job(f"{hog} {turn}", f"hog {hog}", [16] * 20))
        left -= set(batcher.next_batch(1).rows)
    assert not left


class TestWhen:
    """A batch leaves as soon as it should, and no sooner."""

    def test_a_lone_request_does_not_wait_for_a_worker_that_idles(self, make):
        batcher = make()
        batcher.admit(Job("a", "c", [5]))
        assert batcher.next_batch(1).rows == [("a", 0)]

    def test_a_part_waits_while_all_workers_are_busy(self, make, clock):
        batcher = make()
        batcher.admit(Job("a", "c", [5]))
        assert batcher.next_batch() is None
        assert batcher.wake_at() == clock.now + MAX_WAIT_S
        clock.now = batcher.wake_at()
        assert batcher.next_batch().rows == [("a", 0)]
        assert batcher.wake_at() is None

    @pytest.mark.parametrize("lengths", [[5] * MAX_ROWS, [80, 80, 80], [128, 128]])
    def test_a_full_one_leaves_at_once(self, make, clock, lengths):
        batcher = make()
        for number, length in enumerate(lengths):
            assert batcher.next_batch() is None
            batcher.admit(Job(number, "c", [length]))
        assert batcher.wake_at() == clock.now
        assert len(batcher.next_batch().rows) == len(lengths)

    def test_a_full_one_leaves_though_it_is_the_turn_of_another(self, make, clock):
        batcher = make()
        batcher.admit(Job("lone", "a", [120]))
        batcher.admit(Job("many", "b", [5] * 2 * MAX_ROWS))
        assert batcher.wake_at() == clock.now
        assert set(ids(batcher.next_batch())) == {"many"}
        clock.now += MAX_WAIT_S
        assert ids(batcher.next_batch()) == ["lone"]

    def test_an_idle_worker_does_not_wake_for_what_is_not_there(self, make):
        batcher = make()
        assert batcher.next_batch(3) is None
        assert batcher.wake_at() is None


class TestWhat:
    """Which rows go together."""

    def test_rows_of_several_clients_by_length(self, make):
        batcher = make()
        for client, length in [("a", 14), ("b", 3), ("c", 9), ("d", 3)]:
            batcher.admit(Job(client, client, [length]))
        batch = batcher.next_batch(1)
        assert ids(batch) == ["b", "d", "c", "a"]
        assert (batch.padded_length, batch.tokens) == (16, 29)

    def test_only_like_lengths(self, make):
        batcher = make()
        batcher.admit(Job("short", "a", [5]))
        batcher.admit(Job("long", "b", [250]))
        assert list(map(ids, drain(batcher))) == [["short"], ["long"]]

    @pytest.mark.parametrize(
        ("batch_cost", "lengths", "together"),
        [
            (24, [100, 96, 20], [96, 100]),
            (24, [80, 100], [80, 100]),  # 180 / (24 + 200) is more than 80 / (24 + 80)
            (24, [50, 100], [50]),  # 150 / (24 + 200) is less than 50 / (24 + 50)
            (200, [50, 100], [50, 100]),
            (200, [100, 96, 20], [96, 100]),
            (24, [112, 112, 128], [112, 112]),
            (24, [124, 120, 128], [120, 124, 128]),
            (2000, [100, 96, 20], [20, 96, 100]),
            (0, [100, 99, 100, 101], [100, 100]),
        ],
    )
    def test_what_joins_is_worth_its_padding(self, make, batch_cost, lengths, together):
        batcher = make(max_batch_tokens=1024, length_step=1, batch_cost=batch_cost)
        batcher.admit(Job("a", "c", lengths))
        assert [lengths[index] for _, index in batcher.next_batch(1).rows] == together

    def test_a_longer_row_stays_out_where_it_would_burst_the_budget(self, make):
        batcher = make(max_batch_tokens=2 * 112 + 10)
        batcher.admit(Job("a", "c", [112, 112, 128]))
        assert [batch.padded_length for batch in drain(batcher)] == [112, 128]

    def test_a_request_larger_than_a_batch_is_spread(self, make):
        batcher = make()
        batcher.admit(Job("a", "c", [16] * 20))
        assert [len(batch.rows) for batch in drain(batcher)] == [8, 8, 4]

    def test_idle_workers_share(self, make):
        batcher = make(max_batch_tokens=1024, max_batch_size=64)
        batcher.admit(Job("a", "c", [16] * 30))
        assert [len(batcher.next_batch(idle).rows) for idle in (3, 2, 1)] == [10, 10, 10]

    def test_clients_take_turns(self, make):
        batcher = make()
        batcher.admit(Job("hog", "hog", [10] * 100))
        for number in range(7):
            batcher.admit(Job(number, number, [10]))
        assert set(ids(batcher.next_batch(1))) == {"hog", *range(7)}

    def test_the_oldest_row_of_a_client_goes_first_though_others_have_its_length(self, make):
        batcher = make(max_batch_size=1)
        batcher.admit(Job("hog", "hog", [10] * 100))
        batcher.admit(Job("mine", "me", [200, 10]))
        assert [batcher.next_batch(1).rows[0] for _ in range(4)] == [
            ("hog", 0),
            ("mine", 0),
            ("hog", 1),
            ("mine", 1),
        ]

    @pytest.mark.parametrize(("max_length", "padded"), [(None, 64), (60, 60), (56, 56)])
    def test_padding_stays_within_what_the_model_takes(self, make, max_length, padded):
        batcher = make(max_length=max_length)
        batcher.admit(Job("a", "c", [55]))
        assert batcher.next_batch(1).padded_length == padded

    def test_a_row_as_long_as_the_budget_fits(self, make):
        batcher = make(max_batch_tokens=250)
        batcher.admit(Job("a", "c", [250]))
        assert batcher.next_batch(1).padded_length == 250


class TestRefused:
    """What is not let in, and leaves no trace."""

    @pytest.mark.parametrize(
        ("lengths", "said"),
        [
            ([], "no rows"),
            ([3, 0], "row 1 has 0 tokens"),
            ([3, 257, 4], "row 1 has 257 tokens; expected at most 256"),
            ([1] * 101, "101 rows; expected at most 100"),
        ],
    )
    def test_what_can_never_run(self, make, lengths, said):
        batcher = make(max_queue_rows=100)
        with pytest.raises(BadRequest, match=said):
            batcher.admit(Job("a", "c", lengths))
        assert batcher.wake_at() is None and batcher.counters.queued_rows == 0

    def test_what_the_model_takes_and_no_batch_does(self, make):
        with pytest.raises(BadRequest, match="expected at most 256"):
            make(max_length=1000).admit(Job("a", "c", [300]))

    def test_an_id_in_use(self, make):
        batcher = make()
        batcher.admit(Job("a", "c", [1]))
        with pytest.raises(BadRequest, match="'a'"):
            batcher.admit(Job("a", "d", [1]))
        drain(batcher)
        batcher.admit(Job("a", "d", [1]))

    def test_a_full_queue_says_how_long_to_wait(self, make, clock):
        batcher = make(max_queue_rows=16)
        clock.now += 60  # without work, which must not count
        for number in range(4):
            batcher.admit(Job(number, "c", [1] * 8))
            batch = batcher.next_batch(1)
            clock.now += 0.2
            assert batcher.finished(batch)
            clock.now += 10
        batcher.admit(Job("a", "c", [1] * 16))
        with pytest.raises(Overloaded, match="16 rows wait") as caught:
            batcher.admit(Job("b", "c", [1] * 4))
        assert caught.value.retry_after_ms == pytest.approx(100, abs=1)  # 4 rows at 8 in 0.2 s

    def test_a_full_queue_before_anything_was_measured(self, make):
        batcher = make(max_queue_rows=1)
        batcher.admit(Job("a", "c", [1]))
        with pytest.raises(Overloaded) as caught:
            batcher.admit(Job("b", "c", [1]))
        assert caught.value.retry_after_ms == 0

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max_batch_tokens", 0),
            ("max_batch_size", 0),
            ("max_queue_rows", -1),
            ("length_step", 0),
            ("max_length", 0),
            ("max_wait_s", -0.1),
            ("max_wait_s", float("nan")),
            ("batch_cost", -1),
        ],
    )
    def test_limits(self, make, name, value):
        with pytest.raises(ConfigError, match=f"{name} is {value}"):
            make(**{name: value})


class TestEnds:
    """Jobs that end before all of their rows have run."""

    def test_a_deadline_drops_the_rows_that_wait(self, make, clock):
        batcher = make()
        job = Job("a", "c", [16] * 20, clock.now + 1)
        batcher.admit(job)
        batcher.admit(Job("b", "d", [16]))
        running = batcher.next_batch(1)
        assert set(ids(running)) == {"a", "b"}
        assert batcher.wake_at(busy=True) == clock.now + 1
        clock.now += 1
        assert batcher.next_batch(1) is None
        assert batcher.wake_at(busy=True) == clock.now  # to have the job answered
        assert batcher.expired() == [job]
        assert batcher.expired() == []
        assert batcher.finished(running)

    def test_a_deadline_leaves_a_job_alone_that_runs(self, make, clock):
        batcher = make()
        batcher.admit(Job("a", "c", [16], clock.now + 1))
        batch = batcher.next_batch(1)
        assert batcher.wake_at(busy=True) is None
        clock.now += 2
        assert batcher.expired() == []
        assert batcher.finished(batch)

    def test_a_deadline_holds_for_rows_put_back(self, make, clock):
        batcher = make()
        job = Job("a", "c", [16], clock.now + 1)
        batcher.admit(job)
        batch = batcher.next_batch(1)
        assert batcher.wake_at(busy=True) is None
        batcher.requeue(batch)
        assert batcher.wake_at(busy=True) == clock.now + 1
        clock.now += 1
        assert batcher.next_batch(1) is None
        assert batcher.expired() == [job]

    def test_a_dead_worker_costs_nothing_once(self, make):
        batcher = make()
        for client in "abc":
            batcher.admit(Job(client, client, [16, 16]))
        first = batcher.next_batch(1)
        batcher.admit(Job("new", "new", [16]))
        assert batcher.requeue(first) == []
        assert not batcher.finished(first)  # its reply came late
        assert [set(ids(batch)) for batch in drain(batcher)] == [{"a"}, {"b"}, {"c"}, {"new"}]

    def test_rows_put_back_are_padded_as_their_longest(self, make):
        batcher = make(max_batch_tokens=1024)
        batcher.admit(Job("a", "c", [112, 16, 128]))
        first = batcher.next_batch(1)
        batcher.requeue(first)
        second = batcher.next_batch(1)
        assert second.rows == first.rows == [("a", 0), ("a", 2)]
        assert second.padded_length == first.padded_length == 128

    def test_a_row_that_kills_takes_only_its_own_job_along(self, make):
        batcher = make(max_batch_size=3)
        poison = Job("poison", "x", [16] * 5)
        batcher.admit(Job("good", "y", [16]))
        batcher.admit(poison)
        lost, done = [], []
        while (batch := batcher.next_batch(1)) is not None:
            if ("poison", 0) in batch.rows:
                lost += batcher.requeue(batch)
            else:
                assert batcher.finished(batch)
                done += ids(batch)
        assert lost == [poison]
        assert done == ["good"]
        assert batcher.counters.queued_rows == batcher.counters.running_rows == 0

    def test_a_client_that_is_gone(self, make):
        batcher = make(max_batch_size=2)
        mine = [Job("a", "me", [16] * 3), Job("b", "me", [200])]
        batcher.admit(mine[0])
        running = batcher.next_batch(1)
        batcher.admit(mine[1])
        batcher.admit(Job("c", "you", [16]))
        assert batcher.cancel("me") == mine
        assert batcher.cancel("me") == []
        assert batcher.requeue(running) == []
        assert list(map(ids, drain(batcher))) == [["c"]]

    def test_a_dropped_job_may_be_asked_for_anew(self, make):
        batcher = make(max_batch_size=2)
        batcher.admit(Job("a", "c", [16] * 3))
        old = batcher.next_batch(1)
        batcher.drop("a")
        batcher.drop("a")
        batcher.admit(Job("a", "c", [16]))
        assert batcher.requeue(old) == []  # rows of the job of before
        assert [batch.rows for batch in drain(batcher)] == [[("a", 0)]]


class TestCost:
    """What does not grow."""

    def test_a_batch_costs_the_same_however_many_rows_wait(self, make):
        def lines(queued):
            batcher = make(max_batch_tokens=4096, max_batch_size=32)
            for number in range(queued):
                batcher.admit(Job(number, number % 50, [1 + number % 512]))
            for _ in range(3):  # so that rows are missing from the middle
                batcher.next_batch(1)
            count = 0

            def trace(frame, event, arg):
                nonlocal count
                count += event == "line"
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                rows = len(batcher.next_batch(1).rows)
            finally:
                sys.settrace(before)
            return count / rows

        assert lines(10_000) <= 1.5 * lines(1_000)

    def test_finished_jobs_are_forgotten_long_before_their_deadline(self, make, clock):
        batcher = make()
        jobs = []
        for number in range(5000):
            job = Job(number, number, [16], clock.now + 1e9)
            batcher.admit(job)
            jobs.append(weakref.ref(job))
            del job
            drain(batcher)
        gc.collect()
        assert sum(job() is not None for job in jobs) < 1500

    def test_counters(self, make):
        batcher = make()
        assert batcher.counters.padding_share == 0.0
        batcher.admit(Job("a", "c", [8] * 10))
        batcher.next_batch(1)
        counters = batcher.counters
        assert (counters.queued_rows, counters.running_rows) == (2, 8)
        assert (counters.batches, counters.rows) == (1, 8)
        assert (counters.tokens, counters.padded_tokens, counters.padding_share) == (64, 128, 0.5)
