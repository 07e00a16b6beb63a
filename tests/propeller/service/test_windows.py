"""Examples with several rows: from raws to rows to parts to answers. Pure; the model is a line of numpy."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from propeller.bundle import ArraySpec, Bundle
from propeller.errors import BadRequest, DataError, Overloaded, PropellerError, ServerError, WorkerDied
from propeller.processor import Processor, register_processor
from propeller.service.layout import Layout
from propeller.service.model import Model
from propeller.service.plan import BatchLimits
from propeller.service.pool import Pool
from propeller.service.serving import Serving
from propeller.service.wire import Request, WireArray

IDS = ArraySpec("ids", "int64", ("batch", "seq_len"), pad_value=9)
MASK = ArraySpec("mask", "int64", ("batch", "seq_len"))
SUM = ArraySpec("sum", "int64", ("batch",))


class Windows(Processor):
    """Examples are `{"ids": [...]}`, cut after every third; answers `{"sum": ..., "places": ...}`."""

    name = "windows_sum"
    text = "x" * 1000

    def prepare(self, raws):
        return [example for own in self.windows(raws) for example in own]

    def windows(self, raws):
        if any(raw["ids"] == [13] for raw in raws):
            raise DataError("13 is unlucky")
        if any(raw["ids"] == [14] for raw in raws):
            raise PropellerError("the dictionary is gone")
        return [
            [
                {
                    "ids": np.array(raw["ids"][at : at + 3], np.int32),
                    "mask": np.ones(len(raw["ids"][at : at + 3]), np.int64),
                    "place": at,
                    "text": self.text,
                    "offsets": np.zeros((3, 2), np.int64),
                }
                for at in range(0, len(raw["ids"]), 3)
            ]
            for raw in raws
        ]

    def finish(self, outputs):
        return [{"sum": int(value)} for value in outputs["sum"]]

    def join(self, raw, examples, parts):
        if raw.get("bad"):
            raise KeyError("bad")
        assert [part["sum"] for part in parts] == [example["ids"].sum() for example in examples]
        return {
            "sum": sum(part["sum"] for part in parts), "places": [example["place"] for example in examples],
            "raw": raw,
        }  # fmt: skip

    parse = format = finish

    def metrics(self):
        return {}

    def save(self, folder):
        return {}

    @classmethod
    def load(cls, folder, settings):
        return cls()

    fingerprint = "1"


class Unjoined(Windows):
    """It forgot how to join."""

    name = "windows_unjoined"
    join = Processor.join


@pytest.fixture(scope="module", autouse=True)
def _registered():
    from propeller import processor

    for cls in (Windows, Unjoined):
        register_processor(cls)
    yield
    for cls in (Windows, Unjoined):
        del processor._registered[cls.name]


def bundle(name=Windows.name):
    metadata = {"ignores_padding": True, "processor": {"name": name, "settings": {}}}
    return Bundle(Path("somewhere"), (IDS, MASK), (SUM,), {"seq_len": 64}, {}, metadata, "0" * 64)


def raws_of(*counts, **more):
    """Examples of so many ids: 1 2 3 ..."""
    return [{"ids": list(range(1, count + 1)), **more} for count in counts]


def answers_of(raws):
    return [{"sum": sum(r["ids"]), "places": list(range(0, len(r["ids"]), 3)), "raw": r} for r in raws]


class TestLayout:
    def prepare(self, raws, name=Windows.name, max_rows=100, **options):
        return Layout("small", bundle(name), max_rows).prepare(Request("r1", raws=raws, **options))

    def test_rows_and_windows(self):
        raws = raws_of(2, 7, 3)
        found = self.prepare(raws)
        np.testing.assert_array_equal(
            found.arrays["ids"], [[1, 2, 9], [1, 2, 3], [4, 5, 6], [7, 9, 9], [1, 2, 3]]
        )
        assert found.lengths == [2, 3, 3, 1, 3] and not found.extras
        assert found.windows.raws == raws
        for own, wanted in zip(found.windows.examples, Windows().windows(raws), strict=True):
            for example, one in zip(own, wanted, strict=True):
                assert example.keys() == one.keys()
                for name, value in one.items():
                    np.testing.assert_array_equal(example[name], value)
                assert np.shares_memory(example["ids"], found.arrays["ids"]), "it is not held twice"

    def test_several_requests_at_once_are_as_each_alone(self):
        one = Layout("small", bundle(Windows.name))
        requests = [Request(id, raws=raws_of(*counts)) for id, counts in {"r1": (2, 7), "r2": (3,)}.items()]
        for found, request in zip(one.prepare_all(requests), requests, strict=True):
            alone = one.prepare(request)
            assert found.lengths == alone.lengths and found.num_bytes == alone.num_bytes
            np.testing.assert_array_equal(found.arrays["ids"], alone.arrays["ids"])
            assert found.windows.raws == request.raws
            for example in itertools.chain(*found.windows.examples):
                assert np.shares_memory(example["ids"], found.arrays["ids"])

    def test_what_is_held_counts(self):
        few, many = self.prepare(raws_of(3)), self.prepare(raws_of(6))
        arrays = sum(array.nbytes for array in few.arrays.values())
        assert arrays + 1000 + 48 < few.num_bytes < arrays + 1000 + 48 + 1500
        # A text that all windows share counts once.
        assert many.num_bytes - few.num_bytes < 1000
        long = self.prepare([{"ids": [1], "note": ["y" * 100_000]}])
        assert 100_000 < long.num_bytes < 105_000

    def test_arrays_come_from_examples_of_one_row_alone(self):
        found = self.prepare(raws_of(2, 3), want="arrays")
        assert found.windows is None and found.extras["place"].tolist() == [0, 0]
        with pytest.raises(BadRequest, match="2 examples make 4 rows.*Ask for answers") as caught:
            self.prepare(raws_of(2, 9), want="arrays")
        assert caught.value.request_id == "r1"

    def test_too_many_windows(self):
        assert len(self.prepare(raws_of(30), max_rows=10).lengths) == 10
        with pytest.raises(BadRequest, match="1 examples make 11 rows.*at most 10.*shorter ones") as caught:
            self.prepare(raws_of(31), max_rows=10)
        assert caught.value.request_id == "r1"

    def test_an_example_that_is_bad_is_named(self):
        for number, problem in ((13, "13 is unlucky"), (14, "the dictionary is gone")):
            with pytest.raises(BadRequest, match=rf"raws\[1\]: {problem}"):
                self.prepare([*raws_of(7), {"ids": [number]}])

    def test_what_is_the_processors_fault_is_not_the_clients(self):
        with pytest.raises(ServerError, match=r"\[3, 0\] windows of 2 examples; expected one or more"):
            self.prepare(raws_of(7, 0))
        with pytest.raises(ServerError, match=r"\[1, 2\] windows of 2 examples.*it defines no `join`"):
            self.prepare(raws_of(2, 4), Unjoined.name)

    def test_one_window_each_needs_no_join(self):
        found = self.prepare(raws_of(2, 3), Unjoined.name)
        assert found.windows is None and found.lengths == [2, 3]

    def test_answers_are_joined_in_order(self):
        raws = raws_of(2, 7, 3)
        layout = Layout("small", bundle())
        inputs = layout.prepare(Request("r1", raws=raws))
        parts = [{"sum": value} for value in (3, 6, 15, 7, 6)]
        assert layout.join_answers(inputs, parts) == answers_of(raws)

    def test_a_join_that_fails_names_the_example(self):
        layout = Layout("small", bundle())
        inputs = layout.prepare(Request("r1", raws=[*raws_of(3), *raws_of(6, bad=True)]))
        with pytest.raises(ServerError, match=r"raws\[1\] of its 2 parts: KeyError\('bad'\)") as caught:
            layout.join_answers(inputs, [{"sum": 6}, {"sum": 6}, {"sum": 15}])
        assert isinstance(caught.value.__cause__, KeyError)


class Story:
    """A serving; requests are called by their ids. What is joined waits in `joining`."""

    def __init__(self, **limits):
        batches = {"max_tokens": 128, "max_size": limits.pop("max_size", 4), "length_step": 16, "cost": 16}
        others = {"max_queue_rows": 40, "max_wait_s": 0.5, "max_message_bytes": 1 << 20, **limits}
        self.serving = Serving("sums", bundle(), BatchLimits(**batches), **others, clock=lambda: 0.0)
        self.joining = []

    def admit(self, id, raws, *, client="c1", **options):
        request = Request(id, raws=raws, **options)
        self.serving.admit(client, request, self.serving.layout.prepare(request), 0.0)

    def note(self, answered):
        self.joining += [ticket for ticket, reply in answered if reply is None]
        return {ticket.request.id: reply for ticket, reply in answered if reply is not None}

    def run(self, work):
        """What a worker does, and what is answered at once then."""
        sums = (work.arrays["ids"] * work.arrays["mask"]).sum(axis=1)
        parts = Windows().finish({"sum": sums[work.finish]})
        return self.note(self.serving.done(work.batch.number, {"sum": sums} if work.outputs else {}, parts))

    def run_all(self):
        found = {}
        while (work := self.serving.next_batch(1)) is not None:
            found |= self.run(work)
        return found

    def join(self, place=0):
        """What a thread does, and what is answered then."""
        ticket = self.joining.pop(place)
        try:
            result = self.serving.layout.join_answers(ticket.inputs, ticket.answers)
        except ServerError as error:
            result = error
        return self.note(self.serving.joined(ticket, result))


class TestServing:
    def test_windows_of_requests_share_batches_and_are_joined_when_all_are_back(self):
        story = Story()
        first, second = raws_of(10, 2), raws_of(7)
        story.admit("a", first, client="c1")
        story.admit("b", second, client="c2")
        batches = []
        while (work := story.serving.next_batch(1)) is not None:
            batches.append(work)
        assert sum(len(work.batch.rows) for work in batches) == 8
        assert any(len({job for job, _ in work.batch.rows}) == 2 for work in batches)
        for work in reversed(batches):
            assert story.run(work) == {}
        assert len(story.joining) == 2 and not story.serving.is_empty, "they are not answered yet"
        found = story.join() | story.join()
        assert found["a"].answers == answers_of(first) and found["b"].answers == answers_of(second)
        assert story.serving.is_empty and story.serving._held_bytes == 0

    def test_arrays_need_no_thread(self):
        story = Story()
        story.admit("a", raws_of(2, 3), want="arrays")
        (reply,) = story.run_all().values()
        assert [array.name for array in reply.arrays] == ["sum", "place"] and not story.joining

    def test_answers_to_arrays_cannot_be_joined(self):
        story = Story()
        arrays = tuple(WireArray(name, np.ones((1, 2), np.int64)) for name in ("ids", "mask"))
        request = Request("a", arrays=arrays, want="answers")
        with pytest.raises(BadRequest, match="send raws for them") as caught:
            story.serving.admit("c1", request, story.serving.layout.check(request), 0.0)
        assert caught.value.request_id == "a"

    def test_a_join_that_fails(self):
        story = Story()
        story.admit("bad", raws_of(7, bad=True))
        story.admit("good", raws_of(7))
        story.run_all()
        found = story.join() | story.join()
        assert type(found["bad"].error) is ServerError and found["good"].answers == answers_of(raws_of(7))
        assert story.serving.is_empty and story.serving._held_bytes == 0

    def test_a_window_that_fails_ends_the_request(self):
        story = Story()
        story.admit("a", raws_of(30))
        first, second = story.serving.next_batch(1), story.serving.next_batch(1)
        found = story.note(story.serving.failed(first.batch.number, "it raised"))
        assert type(found["a"].error) is ServerError
        assert story.run(second) == {} and not story.joining and story.serving.is_empty

    def test_windows_of_a_worker_that_died_are_tried_once_more(self):
        story = Story()
        story.admit("a", raws_of(18))
        story.run(story.serving.next_batch(1))
        assert story.serving.lost(story.serving.next_batch(1).batch.number) == []
        story.run_all()
        assert story.join()["a"].answers == answers_of(raws_of(18))
        story.admit("b", raws_of(18))
        for _ in range(2):
            found = story.note(story.serving.lost(story.serving.next_batch(1).batch.number))
        assert type(found["b"].error) is WorkerDied and story.run_all() == {} and not story.joining

    def test_a_client_that_leaves_while_its_answers_are_joined(self):
        story = Story()
        story.admit("a", raws_of(7), client="gone")
        story.run_all()
        assert story.serving.has_work("gone") and not story.serving.has_work("other")
        assert story.serving.cancel("gone") == 1 and not story.serving.has_work("gone")
        assert story.join() == {} and story.serving.is_empty and story.serving._held_bytes == 0

    def test_the_end_of_the_server_comes_before_that_of_a_join(self):
        story = Story()
        story.admit("a", raws_of(7))
        story.run_all()
        found = story.note(story.serving.fail_all(ServerError("the end")))
        assert str(found["a"].error) == "the end" and story.serving.is_empty
        assert story.join() == {}, "it was answered already"

    def test_workers_that_are_lost_do_not_matter_to_what_is_joined(self, monkeypatch):
        story = Story()
        pool = Pool(story.serving, [], lambda *_: True, batch_timeout_s=60.0)
        model = Model("sums", Path("somewhere"), lambda path: pool, None)
        story.admit("joined", raws_of(7))
        story.run_all()
        story.admit("waits", raws_of(7))
        monkeypatch.setattr(Pool, "problem", "its folder is gone")
        (_, found) = [answered for _, answered in model.tick()]
        assert list(refused := story.note(found)) == ["waits"]
        assert type(refused["waits"].error) is Overloaded and refused["waits"].error.retry_after_ms > 0
        assert story.join()["joined"].answers == answers_of(raws_of(7)) and story.serving.is_empty

    def test_room_is_counted_in_rows_that_are_run(self):
        story = Story(max_queue_rows=8)
        request = Request("a", raws=raws_of(21))  # seven windows
        story.serving.reserve(request, 10)
        inputs = story.serving.layout.prepare(request)
        story.admit("before", raws_of(6))
        story.serving.release(request, 10)
        with pytest.raises(Overloaded, match="2 rows wait and the queue takes 8"):
            story.serving.admit("c1", request, inputs, 0.0)
        story.run_all()
        story.serving.admit("c1", request, inputs, 0.0)

    def test_no_more_is_taken_than_is_joined(self):
        story = Story(max_queue_rows=8)
        more = Request("more", raws=raws_of(1, 1))
        for number in range(2):
            story.serving.reserve(more, 10)
            story.serving.release(more, 10)
            story.admit(str(number), raws_of(11))
            story.run_all()
        with pytest.raises(Overloaded, match="8 rows wait"):
            story.serving.reserve(more, 10)
        story.join()
        story.serving.reserve(more, 10)

    def test_bytes_that_wait_are_bounded_while_they_are_joined(self):
        story = Story(max_message_bytes=1000)
        for number in range(20):
            try:
                story.admit(str(number), raws_of(3))
            except Overloaded as full:
                assert "bytes wait" in str(full)
                break
            story.run_all()
        assert 5 < number < 16
        while story.joining:
            story.join()
        assert story.serving._held_bytes == 0
        story.admit("again", raws_of(3))


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_each_request_is_answered_once(seed):
    """Admissions, results, joins, failures, deaths and clients that go, in any order."""
    chance, story = random.Random(seed), Story(max_queue_rows=60)
    wanted, bad, dropped, found, running = {}, set(), set(), {}, []

    def note(answered):
        for id, reply in answered.items():
            assert id not in found and id not in dropped, f"{id} is answered twice"
            found[id] = reply

    def admit():
        id, client = f"r{len(wanted)}", chance.randrange(4)
        raws = raws_of(*(chance.randint(1, 15) for _ in range(chance.randint(1, 4))))
        if chance.random() < 0.1:
            raws[0]["bad"] = True
        try:
            story.admit(id, raws, client=client)
        except Overloaded:
            return
        wanted[id] = client, raws
        if "bad" in raws[0]:
            bad.add(id)

    def start():
        work = story.serving.next_batch(chance.randrange(3))
        if work is not None:
            running.append(work)

    def finish():
        if running:
            work, luck = running.pop(chance.randrange(len(running))), chance.random()
            if luck < 0.1:
                note(story.note(story.serving.lost(work.batch.number)))
            elif luck < 0.15:
                note(story.note(story.serving.failed(work.batch.number, "it raised")))
            else:
                note(story.run(work))

    def join():
        if story.joining:
            note(story.join(chance.randrange(len(story.joining))))

    def leave():
        client = chance.randrange(4)
        dropped.update(id for id, (owner, _) in wanted.items() if owner == client and id not in found)
        story.serving.cancel(client)

    for _ in range(600):
        chance.choices([admit, start, finish, join, leave], [3, 6, 6, 3, 0.1])[0]()
    while not story.serving.is_empty:
        for step in (start, finish, join):
            step()
    assert found.keys() | dropped == wanted.keys() and len(wanted) > 50
    for id, reply in found.items():
        if reply.error is None:
            assert reply.answers == answers_of(wanted[id][1]) and id not in bad
    assert {type(None), ServerError} <= {type(reply.error) for reply in found.values()}
    assert story.serving._held_bytes == story.serving._joining_rows == 0
