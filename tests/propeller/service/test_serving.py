"""From requests to batches to replies, on a clock that goes on when told to. The model is a line of numpy."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from propeller.bundle import ArraySpec, Bundle
from propeller.errors import (
    BadRequest,
    DataError,
    DeadlineExceeded,
    Overloaded,
    ServerError,
    WorkerDied,
)
from propeller.processor import Processor, register_processor
from propeller.service.plan import BatchLimits
from propeller.service.serving import Serving
from propeller.service.wire import Request, WireArray

IDS = ArraySpec("ids", "int64", ("batch", "seq_len"))
SUM = ArraySpec("sum", "int64", ("batch",))
KB = 1024


class SumProcessor(Processor):
    """Examples are `{"ids": [...]}`, answers `{"sum": number}`."""

    name = "serving_sum"

    def prepare(self, raws):
        if any(not raw["ids"] for raw in raws):
            raise DataError("no ids")
        return [{"ids": np.array(raw["ids"]), "num_ids": len(raw["ids"])} for raw in raws]

    def finish(self, outputs):
        return [{"sum": int(value)} for value in outputs["sum"]]

    parse = format = finish

    def metrics(self):
        return {}

    def save(self, folder):
        return {"labels": ["a", "b"]}

    @classmethod
    def load(cls, folder, settings):
        return cls()

    fingerprint = "1"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    from propeller import processor

    register_processor(SumProcessor)
    yield
    del processor._registered[SumProcessor.name]


class Clock:
    """Time that goes on when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Story:
    """A serving with its clock; requests are called by their ids."""

    def __init__(self, *, processor=True, ignores_padding=True, axis_limits=None, **limits):
        named = {"name": SumProcessor.name, "settings": {"labels": ["a", "b"]}} if processor else None
        self.bundle = Bundle(
            Path("somewhere"), (IDS,), (SUM,), {"seq_len": 64} if axis_limits is None else axis_limits,
            {"dev": {"acc": 0.5}}, {"ignores_padding": ignores_padding, "processor": named}, "f" * 64,
        )  # fmt: skip
        self.clock = Clock()
        batches = {"max_tokens": 128, "max_size": 8, "length_step": 16, "cost": 16}
        batches |= {name: limits.pop(name) for name in batches if name in limits}
        others = {"max_queue_rows": 40, "max_wait_s": 0.5, "max_message_bytes": 64 * KB, **limits}
        self.serving = Serving("sums", self.bundle, BatchLimits(**batches), **others, clock=self.clock)

    def admit(self, id, rows, *, client="c1", **options):
        """Admits arrays; a row of n tokens is a list of n numbers above 0."""
        width = max(map(len, rows))
        ids = np.array([[*row, *[0] * (width - len(row))] for row in rows])
        request = Request(id, arrays=(WireArray(None, ids),), **options)
        self.serving.admit(client, request, self.serving.layout.check(request), self.clock.now)

    def admit_raws(self, id, rows, *, client="c1", **options):
        request = Request(id, raws=[{"ids": row} for row in rows], **options)
        self.serving.admit(client, request, self.serving.layout.prepare(request), self.clock.now)

    def batch(self, idle_workers=1):
        work = self.serving.next_batch(idle_workers)
        assert work is not None
        return work

    def run(self, work):
        """What a worker does, and what is answered then."""
        sums = work.arrays["ids"].sum(axis=1)
        outputs = {"sum": sums} if work.outputs else {}
        answers = SumProcessor().finish({"sum": sums[work.finish]})
        return by_id(self.serving.done(work.batch.number, outputs, answers))

    def rest(self):
        """Runs all there is."""
        found = {}
        while (work := self.serving.next_batch(1)) is not None:
            found |= self.run(work)
        return found

    def ids(self, work):
        """Of the requests that have a row in a batch."""
        return [self.serving._tickets[job].request.id for job, _ in work.batch.rows]


def by_id(answered):
    found = {ticket.request.id: reply for ticket, reply in answered}
    assert len(found) == len(answered) and all(reply.id == id for id, reply in found.items())
    return found


def sums(reply):
    (array,) = reply.arrays
    assert array.name == "sum" and array.values.dtype == np.int64
    return array.values.tolist()


class TestResults:
    def test_requests_share_a_batch(self):
        story = Story()
        story.admit("a", [[1, 2], [3]], client="c1")
        story.admit("b", [[4, 5, 6]], client="c2")
        work = story.batch()
        assert sorted(story.ids(work)) == ["a", "a", "b"] and work.arrays["ids"].shape == (3, 16)
        assert work.outputs and not work.finish
        found = story.run(work)
        assert (sums(found["a"]), sums(found["b"])) == ([3, 3], [15])
        assert story.serving.is_empty and story.serving.next_batch(1) is None

    def test_answers_and_arrays_in_one_batch(self):
        story = Story()
        story.admit("arrays", [[1] * 3], client="c1")
        story.admit_raws("answers", [[2] * 5, [2]], client="c2")
        story.admit_raws("outputs", [[3] * 2], client="c3", want="arrays")
        story.admit("finished", [[4]], client="c4", want="answers")
        work = story.batch()
        wanted = [place for place, id in enumerate(story.ids(work)) if id in ("answers", "finished")]
        assert work.outputs and sorted(work.finish) == wanted
        found = story.run(work)
        assert sums(found["arrays"]) == [3] and found["arrays"].answers is None
        assert found["answers"].answers == [{"sum": 10}, {"sum": 2}] and not found["answers"].arrays
        assert found["finished"].answers == [{"sum": 4}]
        named = {array.name: array.values.tolist() for array in found["outputs"].arrays}
        assert named == {"sum": [6], "num_ids": [2]}

    def test_answers_alone_need_no_arrays(self):
        story = Story()
        story.admit_raws("answers", [[2]])
        work = story.batch()
        assert not work.outputs and work.finish == [0]
        assert story.run(work)["answers"].answers == [{"sum": 2}]

    @pytest.mark.parametrize("kind", ["arrays", "answers"])
    def test_a_request_larger_than_a_batch_is_split_and_rejoined(self, kind):
        story = Story(max_size=4)
        rows = [[number] * (1 + number % 20) for number in range(1, 31)]
        (story.admit if kind == "arrays" else story.admit_raws)("large", rows)
        batches = []
        while (work := story.serving.next_batch(0) or story.serving.next_batch(1)) is not None:
            batches.append(work)
        assert len(batches) >= 8
        random.Random(3).shuffle(batches)
        for work in batches[:-1]:
            assert not story.run(work) and not story.serving.is_empty
        reply = story.run(batches[-1])["large"]
        values = sums(reply) if kind == "arrays" else [answer["sum"] for answer in reply.answers]
        assert values == [sum(row) for row in rows]
        assert story.serving.is_empty

    def test_a_result_that_comes_twice(self):
        story = Story()
        story.admit("a", [[1]])
        work = story.batch()
        assert list(story.run(work)) == ["a"]
        assert story.run(work) == {}

    def test_padding_that_changes_the_outputs_is_not_added(self):
        story = Story(ignores_padding=False)
        story.admit("short", [[1, 1, 1]])
        story.admit("long", [[1] * 5, [1] * 4])  # sent as two rows of 5
        story.admit("other", [[2] * 3], client="c2")
        shapes = []
        while (work := story.serving.next_batch(1)) is not None:
            shapes.append(work.arrays["ids"].shape)
            story.run(work)
        assert sorted(shapes) == [(2, 3), (2, 5)]

    def test_two_clients_may_have_one_id(self):
        story = Story()
        for client in ("c1", "c2"):
            story.admit("same", [[1]], client=client)
        work = story.batch()
        answered = story.serving.done(work.batch.number, {"sum": work.arrays["ids"].sum(axis=1)}, ())
        assert {ticket.client for ticket, _ in answered} == {"c1", "c2"}


class TestFailures:
    def test_a_poison_request_fails_alone(self):
        story = Story()
        for number in range(4):
            story.admit(f"r{number}", [[number + 1]], client=number)
        work = story.batch()
        assert len(work.batch.rows) == 4
        assert story.serving.failed(work.batch.number, "it raised") == []
        found = {}
        for _ in range(4):
            work = story.batch()
            (id,) = story.ids(work)
            if id == "r2":
                found |= by_id(story.serving.failed(work.batch.number, "it raised"))
            else:
                found |= story.run(work)
        assert type(found["r2"].error) is ServerError
        assert str(found["r2"].error) == "the model failed on this request: it raised"
        assert [sums(found[f"r{number}"]) for number in (0, 1, 3)] == [[1], [2], [4]]
        assert story.serving.is_empty

    def test_a_request_that_was_alone_is_not_tried_again(self):
        story = Story()
        story.admit("bad", [[1], [2]])
        found = by_id(story.serving.failed(story.batch().batch.number, "it raised"))
        assert type(found["bad"].error) is ServerError
        assert story.serving.next_batch(1) is None and story.serving.is_empty

    def test_a_worker_that_died_has_its_requests_tried_once_more(self):
        story = Story()
        story.admit("bad", [[1]], client="c1")
        story.admit("good", [[2]], client="c2")
        assert story.serving.lost(story.batch().batch.number) == []
        first, second = story.batch(), story.batch()
        assert sorted([*story.ids(first), *story.ids(second)]) == ["bad", "good"]
        found = {}
        for work in (first, second):
            if story.ids(work) == ["bad"]:
                found |= by_id(story.serving.lost(work.batch.number))
            else:
                found |= story.run(work)
        assert type(found["bad"].error) is WorkerDied and "tried it again" in str(found["bad"].error)
        assert sums(found["good"]) == [2]
        assert story.serving.next_batch(1) is None and story.serving.is_empty

    def test_a_part_that_fails_ends_the_request(self):
        story = Story(max_size=2)
        story.admit("large", [[1], [2], [3], [4], [5], [6]])
        first, second = story.batch(0), story.batch(0)
        assert list(by_id(story.serving.failed(first.batch.number, "it raised"))) == ["large"]
        assert story.run(second) == {}, "it was answered already"
        assert story.serving.next_batch(1) is None and story.serving.is_empty

    def test_results_of_a_batch_that_was_put_back_are_late(self):
        story = Story()
        story.admit("a", [[7]])
        work = story.batch()
        story.serving.lost(work.batch.number)
        assert story.run(work) == {}
        assert story.serving.failed(work.batch.number, "late") == []
        assert story.serving.lost(work.batch.number) == []
        assert sums(story.rest()["a"]) == [7]

    def test_all_that_is_left_gets_an_error(self):
        story = Story()
        story.admit("runs", [[1]])
        work = story.batch()
        story.admit("waits", [[1]])
        found = by_id(story.serving.fail_all(ServerError("no more")))
        assert {id: str(reply.error) for id, reply in found.items()} == {
            "runs": "no more",
            "waits": "no more",
        }
        assert story.run(work) == {} and story.serving.is_empty


class TestTime:
    def test_a_deadline_that_passes_in_the_queue(self):
        story = Story()
        story.admit("late", [[1]], deadline_ms=100)
        story.admit("patient", [[2]], deadline_ms=10_000)
        assert story.serving.wake_at(busy=True) == pytest.approx(1000.1)
        story.clock.now += 0.2
        found = by_id(story.serving.expired())
        assert list(found) == ["late"] and type(found["late"].error) is DeadlineExceeded
        assert story.serving.expired() == []
        work = story.batch()
        assert story.ids(work) == ["patient"], "what is over is not run"
        assert sums(story.run(work)["patient"]) == [2]

    @pytest.mark.parametrize("deadline_ms", [0, -5, 0.0])
    def test_no_time_at_all(self, deadline_ms):
        story = Story()
        with pytest.raises(DeadlineExceeded) as caught:
            story.admit("late", [[1]], deadline_ms=deadline_ms)
        assert caught.value.request_id == "late" and story.serving.is_empty

    def test_time_that_is_over_when_the_examples_are_prepared(self):
        story = Story()
        request = Request("late", raws=[{"ids": [1]}], deadline_ms=50)
        received, inputs = story.clock.now, story.serving.layout.prepare(request)
        story.clock.now += 0.06
        with pytest.raises(DeadlineExceeded):
            story.serving.admit("c1", request, inputs, received)

    def test_what_runs_at_its_deadline_is_answered(self):
        story = Story()
        story.admit("a", [[3]], deadline_ms=100)
        work = story.batch()
        story.clock.now += 1
        assert story.serving.expired() == []
        assert sums(story.run(work)["a"]) == [3]

    def test_busy_workers_let_rows_wait_for_company(self):
        story = Story()
        story.admit("a", [[1]])
        assert story.serving.next_batch(0) is None
        assert story.serving.wake_at(busy=False) == pytest.approx(1000.5)
        story.clock.now += 0.5
        assert story.ids(story.batch(0)) == ["a"]


class TestClients:
    def test_a_client_that_is_gone(self):
        story = Story()
        story.admit("runs", [[1]], client="gone")
        work = story.batch()
        story.admit("waits", [[1]] * 3, client="gone")
        story.admit("stays", [[5]], client="here")
        assert story.serving.has_work("gone") and story.serving.has_work("here")
        assert story.serving.cancel("gone") == 2
        assert not story.serving.has_work("gone") and story.serving.cancel("gone") == 0
        assert story.serving.counters.queued_rows == 1
        assert story.run(work) == {}
        found = story.rest()
        assert list(found) == ["stays"] and story.serving.counters.rows == 2


class TestRoom:
    def test_a_full_queue(self):
        story = Story(max_queue_rows=4)
        story.admit("first", [[1]] * 3)
        with pytest.raises(Overloaded, match="3 rows wait and the queue takes 4") as caught:
            story.admit("second", [[1]] * 2)
        assert caught.value.retry_after_ms == 0, "nothing was measured yet"
        work = story.batch()
        story.clock.now += 0.3
        story.run(work)
        story.admit("third", [[1]] * 4)
        with pytest.raises(Overloaded) as caught:
            story.admit("fourth", [[1]])
        assert caught.value.retry_after_ms == pytest.approx(100), "3 rows took 300 ms"
        assert list(story.rest()) == ["third"]

    @pytest.mark.parametrize(
        ("rows", "words"),
        [([[1]] * 5, "5 rows; expected at most 4"), ([[1] * 40], "40 tokens; expected at most 32")],
    )
    def test_what_can_never_fit_is_refused_at_once(self, rows, words):
        story = Story(max_queue_rows=4, max_tokens=32)
        with pytest.raises(BadRequest, match=words):
            story.admit("large", rows)
        assert story.serving.is_empty

    def test_bytes_that_wait_are_bounded(self):
        story = Story(max_queue_rows=100_000, max_message_bytes=16 * KB)
        row = [1] * 64  # 512 bytes
        for number in range(16):
            story.admit(f"r{number}", [row] * 32, client=number)
        with pytest.raises(Overloaded, match="requests of 262144 bytes wait") as caught:
            story.admit("more", [[1]])
        assert caught.value.request_id == "more"
        assert len(story.rest()) == 16
        story.admit("more", [[1]])

    def test_room_for_examples_that_are_being_prepared(self):
        story = Story(max_queue_rows=5)
        first, second = (Request(id, raws=[{"ids": [1]}] * 3) for id in ("first", "second"))
        story.serving.reserve(first, 100)
        assert not story.serving.is_empty, "a server that drains waits for it"
        with pytest.raises(Overloaded):
            story.serving.reserve(second, 100)
        story.serving.release(first, 100)
        story.serving.reserve(second, 100)
        story.serving.release(second, 100)
        assert story.serving.is_empty
        with pytest.raises(BadRequest, match="6 rows; expected at most 5"):
            story.serving.reserve(Request("never", raws=[{"ids": [1]}] * 6), 100)

    def test_answers_of_a_bundle_without_processor(self):
        story = Story(processor=False)
        with pytest.raises(
            BadRequest, match="'sums' was exported without a processor: it gives arrays"
        ) as caught:
            story.admit("a", [[1]], want="answers")
        assert caught.value.request_id == "a"


class TestAbout:
    def test_spec(self):
        spec = Story().serving.spec()
        array = {"dtype": "int64", "pad_value": 0, "max_value": None}
        assert spec == {
            "inputs": [{"name": "ids", "axes": ["batch", "seq_len"], **array}],
            "outputs": [{"name": "sum", "axes": ["batch"], **array}],
            "axis_limits": {"seq_len": 64},
            "processor": {"name": "serving_sum", "settings": {"labels": ["a", "b"]}},
            "labels": ["a", "b"],
            "metrics": {"dev": {"acc": 0.5}},
            "bundle": "f" * 64,
        }
        plain = Story(processor=False).serving.spec()
        assert plain["processor"] is None and plain["labels"] is None

    def test_the_figures_of_the_queue(self):
        story = Story()
        story.admit("a", [[1]] * 5)
        assert story.serving.counters.queued_rows == 5
        work = story.batch()
        assert (story.serving.counters.queued_rows, story.serving.counters.running_rows) == (0, 5)
        story.run(work)
        assert story.serving.counters.running_rows == 0 and story.serving.counters.rows == 5


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_each_request_is_answered_once(seed):
    """Admissions, results, failures, deaths, deadlines and clients that go, in any order."""
    chance, story = random.Random(seed), Story(max_queue_rows=60)
    wanted, poison, dropped, found = {}, set(), set(), {}
    running = []

    def note(answered):
        for id, reply in answered.items():
            assert id not in found and id not in dropped, f"{id} is answered twice"
            found[id] = reply

    def admit():
        id, client = f"r{len(wanted)}", chance.randrange(4)
        rows = [[chance.randint(1, 9)] * chance.randint(1, 30) for _ in range(chance.randint(1, 12))]
        method = chance.choice([story.admit, story.admit_raws])
        try:
            method(id, rows, client=client, deadline_ms=chance.choice([None, None, 50, 5000]))
        except Overloaded:
            return
        wanted[id] = client, [sum(row) for row in rows]
        if chance.random() < 0.1:
            poison.add(id)

    def finish():
        if not running:
            return
        work = running.pop(chance.randrange(len(running)))
        live = {
            story.serving._tickets[job].request.id
            for job, _ in work.batch.rows
            if job in story.serving._tickets
        }
        if live & poison:
            note(by_id(story.serving.failed(work.batch.number, "poison")))
        elif chance.random() < 0.1:
            note(by_id(story.serving.lost(work.batch.number)))
        else:
            note(story.run(work))

    def start():
        work = story.serving.next_batch(chance.randrange(3))
        if work is not None:
            running.append(work)

    def pass_time():
        story.clock.now += chance.random() / 20
        note(by_id(story.serving.expired()))

    def leave():
        client = chance.randrange(4)
        dropped.update(id for id, (owner, _) in wanted.items() if owner == client and id not in found)
        story.serving.cancel(client)

    for _ in range(600):
        chance.choices([admit, start, finish, pass_time, leave], [4, 5, 5, 2, 0.1])[0]()
    while not story.serving.is_empty:
        start()
        finish()
        note(by_id(story.serving.expired()))
    assert found.keys() | dropped == wanted.keys() and len(wanted) > 50
    kinds = {type(reply.error) for reply in found.values()}
    assert {type(None), DeadlineExceeded, ServerError} <= kinds
    for id, reply in found.items():
        if reply.error is None:
            answered = None if reply.answers is None else [answer["sum"] for answer in reply.answers]
            assert (answered or sums(reply)) == wanted[id][1]
        assert not (reply.error is None and id in poison)
        assert type(reply.error) is not ServerError or id in poison
