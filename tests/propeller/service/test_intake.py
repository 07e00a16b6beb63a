"""Requests whose examples wait for a thread, which prepares them together, and none for nobody."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from propeller.bundle import ArraySpec, Bundle
from propeller.errors import BadRequest, DeadlineExceeded, Draining, ServerError
from propeller.service.frames import Limits
from propeller.service.frontend import Client
from propeller.service.intake import READY, Intake
from propeller.service.layout import Inputs
from propeller.service.metrics import Metrics
from propeller.service.plan import BatchLimits
from propeller.service.pool import Pool
from propeller.service.serving import Serving
from propeller.service.wire import Request, encode_request

IDS = ArraySpec("ids", "int64", ("batch", "seq_len"))
STAYS, LEAVES = Client(0, b"stays"), Client(0, b"leaves")


class Busy:
    """An intake whose one thread is busy until `free` is called.

    Attributes:
        replies: errors by the id of the request.
        prepared: ids of the requests that were prepared.
        groups: those that were prepared together.
    """

    def __init__(self):
        bundle = Bundle(Path("somewhere"), (IDS,), (IDS,), {}, {}, {"ignores_padding": True}, "0" * 64)
        self.serving = Serving(
            "m", bundle, BatchLimits(128, 8, 16, 16), max_queue_rows=40, max_wait_s=1.0,
            max_message_bytes=1 << 20,
        )  # fmt: skip
        self.serving.layout.prepare, self.serving.layout.prepare_all = self._prepare, self._prepare_all
        pool = Pool(self.serving, [], lambda *_: True, batch_timeout_s=60.0)
        models = {"m": SimpleNamespace(current=pool, pools=lambda: [pool])}
        self.replies, self.prepared, self.groups, self.gone = {}, [], [], []
        frontend = SimpleNamespace(send=self._send, gone=lambda has_work: filter(has_work, self.gone))
        sockets = SimpleNamespace(frontends=[frontend], ring=lambda: None)
        self._free, self._threads = threading.Event(), ThreadPoolExecutor(1)
        self._threads.submit(self._free.wait, 30)
        self.intake = Intake(models, sockets, Limits(), self._threads, Metrics())
        self.intake.state = READY

    def _prepare(self, request):
        if request.raws == ["bad"]:
            raise BadRequest("it is bad", request_id=request.id)
        if request.raws == ["exit"]:
            raise SystemExit(3)
        self.prepared.append(request.id)
        return Inputs({"ids": np.ones((1, 1), np.int64)}, [1])

    def _prepare_all(self, requests):
        self.groups.append([request.id for request in requests])
        if any(request.raws != ["a"] for request in requests):
            raise KeyError("one of them")
        return [self._prepare(request) for request in requests]

    def _send(self, identity, reply):
        assert reply.id not in self.replies
        self.replies[reply.id] = reply.error
        return True

    def ask(self, client, id, raw="a", **options):
        self.intake.take(client, encode_request(Request(id, raws=[raw], want="arrays", **options)))
        self.intake.prepare()

    def free(self):
        """Lets the thread do all it has, and the intake go on with it."""
        self._free.set()
        for _ in range(3):
            self._threads.submit(int).result(30)
            self.intake.go_on()
            self.intake.prepare()
        assert self.serving.counters.queued_rows == len(self.prepared)

    def close(self):
        self.free()
        self._threads.shutdown()


@pytest.fixture
def busy():
    made = Busy()
    yield made
    made.close()


def test_what_came_too_late_is_not_prepared(busy):
    busy.ask(STAYS, "late", deadline_ms=0)
    busy.ask(STAYS, "in time", deadline_ms=60_000)
    busy.ask(STAYS, "has time")
    busy.free()
    assert busy.prepared == ["in time", "has time"]
    assert list(busy.replies) == ["late"] and type(busy.replies["late"]) is DeadlineExceeded


def test_it_is_answered_while_the_threads_are_busy(busy):
    busy.ask(STAYS, "late", deadline_ms=0)
    busy.ask(STAYS, "in time", deadline_ms=60_000)
    busy.intake.answer_late()
    assert list(busy.replies) == ["late"] and type(busy.replies["late"]) is DeadlineExceeded
    busy.free()
    assert busy.prepared == ["in time"] and len(busy.replies) == 1


def test_what_nobody_waits_for_is_not_prepared(busy):
    busy.ask(LEAVES, "left")
    busy.ask(STAYS, "stays")
    busy.gone = [LEAVES]
    busy.intake.drop_the_gone()
    busy.free()
    assert busy.prepared == ["stays"] and not busy.replies


def test_at_the_end_all_is_answered(busy):
    busy.ask(STAYS, "last")
    busy.intake.answer_preparing(Draining("the end"))
    assert type(busy.replies["last"]) is Draining
    busy.free()
    assert not busy.prepared


def test_what_waits_is_prepared_together(busy):
    for id in "abcdefg":
        busy.ask(STAYS, id)
    busy.free()
    assert busy.groups == [[*"cdefg"]], "the first two did not wait"
    assert busy.prepared == [*"abcdefg"] and not busy.replies


def test_a_group_has_its_limit(busy):
    for id in "abcd":
        busy.ask(STAYS, id, raw="a" if id < "c" else "a" * 5000)
    busy.free()
    assert not busy.groups and busy.prepared == [*"abcd"]


def test_a_bad_one_harms_no_neighbour(busy):
    for id, raw in {"1": "a", "2": "a", "3": "a", "4": "bad", "5": "exit", "6": "a"}.items():
        busy.ask(STAYS, id, raw)
    busy.free()
    assert busy.groups == [["3", "4", "5", "6"]]
    assert busy.prepared == ["1", "2", "3", "6"]
    assert {id: type(error) for id, error in busy.replies.items()} == {"4": BadRequest, "5": ServerError}


def test_those_of_a_group_that_are_not_awaited_are_left_out(busy):
    for id in "abcdef":
        busy.ask(LEAVES if id == "e" else STAYS, id, deadline_ms=0 if id == "d" else None)
    busy.gone = [LEAVES]
    busy.intake.drop_the_gone()
    busy.free()
    assert busy.groups == [["c", "f"]] and busy.prepared == ["a", "b", "c", "f"]
    assert list(busy.replies) == ["d"] and type(busy.replies["d"]) is DeadlineExceeded
