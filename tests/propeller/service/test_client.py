"""Clients against a real ROUTER that speaks the wire format and does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from propeller.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    Draining,
    Overloaded,
    ServerError,
    Unavailable,
    WorkerDied,
)
from propeller.service.client import AsyncInferenceClient, InferenceClient
from propeller.service.outbox import Call, Deadline, Outbox
from propeller.service.wire import Reply, Request, WireArray, decode_request, encode_reply

IDS = np.arange(12, dtype=np.int64).reshape(6, 2)
# Longer than anything here takes.
LONG = 60.0


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        threading.Event().wait(0.002)


def client_threads():
    return [thread for thread in threading.enumerate() if thread.name == "propeller-client"]


def doubled(request):
    """What a model could give: each array times two, by the names of outputs; for raws their lengths."""
    if request.kind != "predict":
        return Reply(request.id, result={"kind": request.kind, "model": request.model})
    if request.raws is None:
        return Reply(
            request.id,
            tuple(
                WireArray(name or f"out{i}", values * 2) for i, (name, values) in enumerate(request.arrays)
            ),
        )
    if request.want == "answers":
        return Reply(request.id, answers=[{"echo": raw} for raw in request.raws])
    texts = request.raws
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = 1
    return Reply(request.id, (WireArray("tokens", tokens),))


def whole(request):
    """Frames that need not be this request's reply."""
    return [encode_reply(doubled(request))]


class Server:
    """A ROUTER in a thread.

    Args:
        script: of a request, all messages to send back, as frames (the default: its reply). None keeps the
            request for `release`.
    """

    def __init__(self, script=None, port=None, secure=None):
        self.script = script or (lambda request: whole(request))
        self.seen = []
        self.links = set()
        self.kept = []
        self._todo = queue.SimpleQueue()
        self._stop = threading.Event()
        self._opened = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(port, secure), name="fake-server")
        self._thread.start()
        self.port = self._opened.get(timeout=20)
        self.address = f"tcp://127.0.0.1:{self.port}"

    def _run(self, port, secure):
        with zmq.Context() as context:
            router = context.socket(zmq.ROUTER)
            router.setsockopt(zmq.LINGER, 0)
            keeper = secure(context, router) if secure else contextlib.nullcontext()
            with keeper, router:
                if port is None:
                    port = router.bind_to_random_port("tcp://127.0.0.1")
                else:
                    router.bind(f"tcp://127.0.0.1:{port}")
                self._opened.put(port)
                while not self._stop.is_set():
                    while not self._todo.empty():
                        router.send_multipart(self._todo.get())
                    if router.poll(5):
                        self._serve(router)

    def _serve(self, router):
        identity, *frames = router.recv_multipart()
        request = decode_request(frames)
        self.seen.append(request)
        self.links.add(identity)
        messages = self.script(request)
        for message in messages or ():
            router.send_multipart([identity, *message])
        if messages is None:
            self.kept.append((identity, request))

    def release(self):
        """Answers all requests that were kept, the last one first."""
        while self.kept:
            identity, request = self.kept.pop()
            self._todo.put([identity, *encode_reply(doubled(request))])

    def stop(self):
        self._stop.set()
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


@pytest.fixture(autouse=True)
def no_thread_stays():
    """Whatever a test does, its clients end with it."""
    before = len(client_threads())
    yield
    gc.collect()
    wait_for(lambda: len(client_threads()) <= before)


@pytest.fixture
def server():
    with Server() as running:
        yield running


@pytest.fixture
def small_server():
    """One that hangs up on a frame of more than 1 MiB."""

    def limited(context, router):
        router.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
        return contextlib.nullcontext()

    with Server(secure=limited) as running:
        yield running


@pytest.fixture
def client(server):
    with InferenceClient(server.address, timeout=LONG, max_rows=4, max_in_flight=3) as made:
        yield made


def errors(*given):
    """A script that answers with these errors, one after the other, then properly."""
    left = list(given)

    def script(request):
        return [encode_reply(Reply(request.id, error=left.pop(0)))] if left else whole(request)

    return script


class TestCalls:
    def test_arrays_by_place(self, client):
        first, second = client(IDS, [[1.5]] * 6)
        np.testing.assert_array_equal(first, IDS * 2)
        np.testing.assert_array_equal(second, np.full((6, 1), 3.0))
        assert first.dtype == np.int64 and second.dtype == np.float64

    @pytest.mark.parametrize("rows", [1, 6])
    def test_results_are_the_callers_own(self, client, rows):
        (result,) = client(IDS[:rows])
        result += 1
        assert result.flags.owndata or result.base.flags.owndata

    def test_arrays_by_name(self, client, server):
        result = client.predict({"input_ids": IDS, "mask": np.ones(6, bool)})
        assert list(result) == ["input_ids", "mask"]
        np.testing.assert_array_equal(result["input_ids"], IDS * 2)
        assert [name for name, _ in server.seen[0].arrays] == ["input_ids", "mask"]

    def test_answers(self, client, server):
        raws = ["a", ("b", "c"), {"text_a": "d", "number": 1}, ("e",), "\ud800\x00"]
        wanted = [
            "a",
            ["b", "c"],
            raws[2],
            ["e"],
            raws[4],
        ]
        assert client.answers(raws) == [{"echo": raw} for raw in wanted]
        assert [len(request.raws) for request in server.seen] == [4, 1]
        assert {request.want for request in server.seen} == {"answers"}

    def test_outputs_are_filled_up_to_the_longest(self, client, server):
        found = client.outputs(["a", "ab", "abc", "ab", "abcde", ""])["tokens"]
        assert found.shape == (6, 5)
        assert found.sum(axis=1).tolist() == [1, 2, 3, 2, 5, 0]
        assert {request.want for request in server.seen} == {"arrays"}

    def test_spec_and_ping(self, server):
        with InferenceClient(server.address, model="other") as client:
            assert client.spec() == {"kind": "spec", "model": "other"}
            assert client.ping(timeout=5) == {"kind": "ping", "model": "other"}
            client(IDS)
        assert server.seen[-1].model == "other"

    def test_the_deadline_is_sent(self, client, server):
        client(IDS[:1], timeout=20)
        client(IDS[:1], timeout=None)
        assert 15_000 < server.seen[0].deadline_ms < 20_000
        assert server.seen[1].deadline_ms is None


class TestSplitting:
    def test_by_rows_in_order_though_replies_are_not(self):
        with Server(lambda request: None) as server:
            with InferenceClient(server.address, timeout=LONG, max_rows=4, max_in_flight=3) as client:
                with ThreadPoolExecutor() as pool:
                    result = pool.submit(client, np.arange(42))
                    for in_flight in (3, 3, 3, 2):
                        wait_for(lambda expected=in_flight: len(server.kept) == expected)
                        assert len(server.kept) == in_flight
                        server.release()
                    (found,) = result.result()
        np.testing.assert_array_equal(found, np.arange(42) * 2)
        assert [len(request.arrays[0].values) for request in server.seen] == [4] * 10 + [2]

    def test_by_bytes(self, server):
        wide = np.ones((20, 1 << 15), np.float32)
        with InferenceClient(server.address, timeout=LONG) as client:
            (found,) = client(wide)
        np.testing.assert_array_equal(found, wide * 2)
        assert [len(request.arrays[0].values) for request in server.seen] == [7, 7, 6]

    def test_by_length_of_the_json(self, server):
        texts = ["x" * 200_000] * 4 + ["y" * 700_000, "z"]
        with InferenceClient(server.address, timeout=LONG) as client:
            found = client.answers(texts)
        assert [answer["echo"] for answer in found] == texts
        assert [len(request.raws) for request in server.seen] == [2, 2, 1, 1]

    def test_the_first_error_in_order_is_raised_and_the_rest_given_up(self):
        def script(request):
            row = int(request.arrays[0].values[0])
            if row == 8:
                return None
            error = {0: None, 4: WorkerDied("the second"), 12: BadRequest("the fourth")}[row]
            return whole(request) if error is None else [encode_reply(Reply(request.id, error=error))]

        with Server(script) as server, InferenceClient(server.address, timeout=LONG, max_rows=4) as client:
            with pytest.raises(WorkerDied, match="the second"):
                client(np.arange(16))
            server.release()
            wait_for(lambda: client.dropped_replies > 0)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arrays", "problem"),
        [
            ([], "no arrays"),
            ([np.zeros((0, 3))], "zero rows"),
            ([np.zeros((2, 3)), np.zeros(3)], r"same number of rows, got \[2, 3\]"),
            ([np.float32(1)], "Array 0 is a single float32"),
            ([[[1], [1, 2]]], "must have one shape"),
            ([np.array(["text"])], "Array 0 is <U4; expected one of bool"),
            ([np.array([None])], "Array 0 is object"),
        ],
    )
    def test_arrays(self, client, server, arrays, problem):
        with pytest.raises(BadRequest, match=problem):
            client(*arrays)
        assert not server.seen

    def test_arrays_by_name(self, client):
        with pytest.raises(BadRequest, match="Expected arrays by name, got list"):
            client.predict([IDS])
        with pytest.raises(BadRequest, match="no arrays"):
            client.predict({})
        with pytest.raises(BadRequest, match="Array 'x' is object"):
            client.predict({"x": np.array([{}])})

    @pytest.mark.parametrize(
        ("raws", "problem"),
        [
            ([], "list of examples is empty"),
            ("text", "got one str; write"),
            ({"text_a": "x"}, "got one dict; write"),
            (["x", 3], "Example 1 is int; expected a text"),
            ([("a", 3)], "Example 0 is tuple"),
            ([{"x": float("nan")}], "Example 0 cannot be sent as JSON"),
            ([{"x": b""}], "Example 0 cannot be sent as JSON"),
        ],
    )
    def test_raws(self, client, server, raws, problem):
        for method in (client.answers, client.outputs):
            with pytest.raises(BadRequest, match=problem):
                method(raws)
        assert not server.seen

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "10", True])
    def test_timeouts(self, client, timeout):
        with pytest.raises(ConfigError, match="timeout must be a finite number"):
            InferenceClient(timeout=timeout)
        for call in (lambda: client(IDS, timeout=timeout), lambda: client.map("arrays", [], timeout=timeout)):
            with pytest.raises(ConfigError, match="timeout must be a finite number"):
                call()

    @pytest.mark.parametrize(
        "address",
        [
            "localhost:8888",
            "tcp://localhost",
            "tcp://:8888",
            "tcp://h:99999",
            "tcp://h:1/x",
            "ipc://",
            "",
            None,
        ],
    )
    def test_addresses(self, address):
        with pytest.raises(ConfigError, match="expected tcp://host:port"):
            InferenceClient(address)

    def test_other_settings(self, client, tmp_path):
        for name in ("max_rows", "max_in_flight"):
            with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, got 0"):
                InferenceClient(**{name: 0})
        with pytest.raises(ConfigError, match=r"server\.key"):
            InferenceClient(curve_keys=tmp_path)
        with pytest.raises(ConfigError, match="Unknown method 'answer'.*Did you mean 'answers'"):
            client.map("answer", [])


class TestMap:
    def test_in_order_and_no_faster_than_answered(self, server):
        read = []

        def batches():
            for number in range(50):
                read.append(number)
                yield [str(number)] * 5

        with InferenceClient(server.address, timeout=LONG, max_rows=2, max_in_flight=4) as client:
            for number, answers in enumerate(client.map("answers", batches())):
                assert [answer["echo"] for answer in answers] == [str(number)] * 5
                assert len(read) <= number + 5
        assert number == 49

    def test_each_method(self, client):
        assert client.map("outputs", [["ab"]]).__next__()["tokens"].shape == (1, 2)
        assert [[array.tolist() for array in arrays] for arrays in client.map("arrays", [[[1], [2]]])] == [
            [[2], [4]]
        ]
        assert next(client.map("predict", [{"x": [3]}]))["x"].tolist() == [6]

    def test_errors_end_it_or_stand_in_their_place(self, client):
        inputs = [["a"], [], ["b"], [1], ["c"]]
        results = client.map("answers", inputs)
        assert next(results) == [{"echo": "a"}]
        with pytest.raises(BadRequest, match="empty"):
            next(results)
        assert list(results) == []
        found = list(client.map("answers", inputs, return_errors=True))
        assert [type(result) for result in found] == [list, BadRequest, list, BadRequest, list]

    def test_endless_bad_inputs_are_read_lazily(self, client):
        results = client.map("answers", iter(list, None), return_errors=True)
        assert isinstance(next(results), BadRequest)
        results.close()

    def test_what_the_inputs_raise_is_raised(self, client):
        def broken():
            yield ["a"]
            raise OSError("the file is gone")

        results = client.map("answers", broken())
        with pytest.raises(OSError, match="the file is gone"):
            list(results)


class TestRetry:
    def test_overloaded_is_waited_out(self, client, server):
        server.script = errors(Overloaded("full", 30), Overloaded("full"), Overloaded("full", -5))
        np.testing.assert_array_equal(client(IDS[:2])[0], IDS[:2] * 2)
        assert len({request.id for request in server.seen}) == 4
        lefts = [request.deadline_ms for request in server.seen]
        assert lefts == sorted(lefts, reverse=True) and lefts[0] - lefts[1] >= 30 * 0.99

    def test_until_the_deadline(self, client, server):
        server.script = errors(*[Overloaded("full", 1)] * 10_000)
        with pytest.raises(Overloaded, match="full"):
            client(IDS[:2], timeout=0.2)
        assert len(server.seen) > 2
        # Of the first call an attempt may still come.
        server.script = errors(*[Overloaded("full", 1e9)] * 2)
        with pytest.raises(Overloaded):  # at once: there is no use in waiting
            client(IDS[:2], timeout=1.0)

    def test_not_at_all(self, server):
        with InferenceClient(server.address, timeout=LONG, retry=False) as client:
            for error in (Overloaded("full", 3), Draining("leaving")):
                server.script = errors(error)
                with pytest.raises(type(error)):
                    client(IDS[:2])
            assert len(server.seen) == 2

    def test_draining_then_another_server(self):
        with Server(lambda request: None) as old:
            port = old.port
            with InferenceClient(old.address, timeout=LONG) as client, ThreadPoolExecutor() as pool:
                first = pool.submit(client, IDS)
                wait_for(lambda: len(old.kept) == 1)
                old.script = lambda request: [encode_reply(Reply(request.id, error=Draining("leaving")))]
                second = pool.submit(client, IDS + 1)
                wait_for(lambda: len(old.seen) > 1)
                identity, request = old.kept[0]
                old._todo.put([identity, *encode_reply(doubled(request))])
                np.testing.assert_array_equal(first.result()[0], IDS * 2)
                old.stop()
                with Server(port=port):
                    np.testing.assert_array_equal(second.result()[0], IDS * 2 + 2)

    def test_a_link_to_a_draining_server_is_left_when_the_last_call_on_it_is_given_up(self):
        with Server(lambda request: None) as server:
            with InferenceClient(server.address, timeout=LONG) as client, ThreadPoolExecutor() as pool:
                hanging = pool.submit(client, IDS, timeout=1.0)
                wait_for(lambda: len(server.kept) == 1)
                server.script = errors(Draining("leaving"))
                np.testing.assert_array_equal(client(IDS)[0], IDS * 2)
                assert len(server.links) == 2
                with pytest.raises(Unavailable):
                    hanging.result()

    @pytest.mark.parametrize("error", [DeadlineExceeded, WorkerDied, ServerError, BadRequest])
    def test_others_are_raised_at_once(self, client, server, error):
        server.script = errors(error("so it is"))
        with pytest.raises(error, match="so it is") as caught:
            client(IDS[:2])
        assert caught.value.request_id == server.seen[0].id


class TestLostAndLate:
    def test_a_timeout_and_then_it_works_again(self, client, server):
        client.ping()
        server.script = lambda request: None
        with pytest.raises(Unavailable, match=rf"{server.address} within 0\.1 s: the connection stands"):
            client(IDS[:1], timeout=0.1)
        server.script = whole
        wait_for(lambda: server.kept)
        server.release()
        np.testing.assert_array_equal(client(IDS[:1])[0], IDS[:1] * 2)
        wait_for(lambda: client.dropped_replies == 1)

    def test_nobody_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        with InferenceClient(f"tcp://127.0.0.1:{port}", timeout=0.2) as client:
            with pytest.raises(Unavailable, match=rf":{port} within 0.2 s: there never was a connection"):
                client(IDS)
            with Server(port=port):
                np.testing.assert_array_equal(client(IDS, timeout=LONG)[0], IDS * 2)

    def test_something_else_listens(self):
        """An HTTP server, such as that of the metrics, waits for a line that a client never sends."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            with InferenceClient(f"tcp://127.0.0.1:{other.getsockname()[1]}", timeout=0.5) as client:
                with pytest.raises(Unavailable, match="never was a connection .nobody answers there.. Check"):
                    client(IDS)

    def test_a_name_that_is_not_known_and_then_is(self, server, monkeypatch):
        def unknown(*_, **__):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        with InferenceClient(f"tcp://localhost:{server.port}", timeout=LONG) as client:
            with monkeypatch.context() as patched:
                patched.setattr(socket, "getaddrinfo", unknown)
                with pytest.raises(Unavailable, match="cannot be resolved.*service not known"):
                    client(IDS, timeout=0.2)
            np.testing.assert_array_equal(client(IDS)[0], IDS * 2)

    def test_what_listens_is_something_else(self):
        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    listening.accept()[0].close()

        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=hang_up)
            thread.start()
            with InferenceClient(f"tcp://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3) as client:
                with pytest.raises(Unavailable, match="may be no inference server"):
                    client(IDS)
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()

    def test_each_address_of_a_name_is_tried(self, server, monkeypatch):
        """As where localhost is ::1 first, and the server listens on 127.0.0.1 only."""
        real = socket.getaddrinfo

        def two(host, port, **more):
            return [(socket.AF_INET6, 1, 6, "", ("::1", port, 0, 0)), *real("127.0.0.1", port, **more)]

        monkeypatch.setattr(socket, "getaddrinfo", two)
        with InferenceClient(f"tcp://somewhere:{server.port}", timeout=LONG) as client:
            assert client.ping()["kind"] == "ping"

    def test_a_restart_loses_nothing(self):
        with Server(lambda request: None) as old:
            with (
                InferenceClient(old.address, timeout=LONG, max_rows=2) as client,
                ThreadPoolExecutor() as pool,
            ):
                result = pool.submit(client, IDS)
                wait_for(lambda: len(old.kept) == 3)
                old.stop()
                with Server(port=old.port) as new:
                    np.testing.assert_array_equal(result.result()[0], IDS * 2)
                    assert len(new.seen) == 3
                    again = pool.submit(client, IDS)
                    np.testing.assert_array_equal(again.result()[0], IDS * 2)
                with pytest.raises(Unavailable, match="the connection was lost and could not be made again"):
                    client(IDS, timeout=0.3)

    def test_without_retry_a_lost_connection_is_raised(self):
        with Server(lambda request: None) as server:
            with InferenceClient(server.address, timeout=LONG, retry=False) as client:
                with ThreadPoolExecutor() as pool:
                    result = pool.submit(client, IDS)
                    wait_for(lambda: server.kept)
                    server.stop()
                    with pytest.raises(Unavailable, match="was lost"):
                        result.result()

    def test_a_request_that_the_server_hangs_up_on(self, small_server):
        """It fails, and none of those that it is sent with."""
        large = np.zeros((1, 1 << 18), np.int64)
        with InferenceClient(small_server.address, timeout=LONG) as client, ThreadPoolExecutor(8) as pool:
            before = [pool.submit(client, IDS + number) for number in range(20)]
            with pytest.raises(
                Unavailable, match=r"hung up twice on this request of 20\d{5} bytes.*--max-mess"
            ):
                client(large)
            after = [pool.submit(client, IDS + number) for number in range(20)]
            for number, result in enumerate((*before, *after)):
                np.testing.assert_array_equal(result.result()[0], (IDS + number % 20) * 2)

    def test_parts_are_as_small_as_any_server_takes(self, small_server):
        arrays = np.arange(1 << 19).reshape(-1, 8)
        with InferenceClient(small_server.address, timeout=LONG, max_rows=1 << 20) as client:
            np.testing.assert_array_equal(client(arrays)[0], arrays * 2)

    def test_two_restarts_lose_nothing_that_was_answered_between(self):
        """Only what a connection was lost with twice in a row is suspected."""
        with Server(lambda request: None) as first:
            with (
                InferenceClient(first.address, timeout=LONG, max_rows=2) as client,
                ThreadPoolExecutor() as pool,
            ):
                result = pool.submit(client, IDS)
                wait_for(lambda: len(first.kept) == 3)
                first.stop()
                with Server(port=first.port) as second:
                    second.script = lambda request: whole(request) if len(second.seen) == 1 else None
                    wait_for(lambda: len(second.kept) == 2)
                    second.stop()
                    with Server(port=first.port):
                        np.testing.assert_array_equal(result.result()[0], IDS * 2)

    def test_duplicates_strangers_and_garbage_are_dropped(self, client, server):
        def script(request):
            (reply,) = whole(request)
            stranger = encode_reply(Reply("999999", answers=["not yours"]))
            return [[b""], [b"\x00\xff"], [b"{}"], [b"[" * 5000], stranger, reply, reply, [b"{", b"x"]]

        server.script = script
        for number in range(5):
            np.testing.assert_array_equal(client(IDS[:2] + number)[0], (IDS[:2] + number) * 2)
        wait_for(lambda: client.dropped_replies == 5 * 7)

    def test_a_reply_that_cannot_be_read_is_an_error_of_its_call(self, client, server):
        server.script = lambda request: [[b'{"v": 1, "id": "%s", "ok": 3}' % request.id.encode()]]
        with pytest.raises(Exception, match="ok must be true or false") as caught:
            client(IDS[:2])
        assert caught.value.request_id == server.seen[0].id

    @pytest.mark.parametrize(
        ("reply", "problem"),
        [
            ({"arrays": (WireArray("y", IDS),)}, "'y' with 6 rows for 2 of input"),
            ({"arrays": (WireArray("y", np.array(1)),)}, "'y' with no rows"),
            ({"answers": [1]}, "the answers with 1 rows"),
            ({}, "no arrays"),
        ],
    )
    def test_replies_that_do_not_fit(self, client, server, reply, problem):
        server.script = lambda request: [encode_reply(Reply(request.id, **reply))]
        with pytest.raises(ServerError, match=problem):
            client(IDS[:2])

    def test_parts_that_do_not_fit_together(self, client, server):
        def script(request):
            rows = len(request.arrays[0].values)
            values = np.zeros((rows, 3), np.float32 if rows == 4 else np.int64)
            return [encode_reply(Reply(request.id, (WireArray("y", values),)))]

        server.script = script
        with pytest.raises(ServerError, match="do not fit together: float32 .4, 3., int64 .2, 3."):
            client(IDS)

    def test_answers_and_results_that_are_missing(self, client, server):
        server.script = lambda request: [encode_reply(Reply(request.id))]
        with pytest.raises(ServerError, match="no answers"):
            client.answers(["x"])
        with pytest.raises(ServerError, match="no result"):
            client.spec()

    def test_what_is_given_up_while_it_is_sent_waits_for_no_reply(self):
        outbox = Outbox()
        call = Call(Request("-", "ping"), Deadline(None), retry=True)
        outbox.add(call)
        assert outbox.first() is call
        assert not outbox.forget(call)
        outbox.was_sent(call, "1")
        assert not outbox.awaits_replies()
        assert outbox.answered("1") is None and outbox.dropped == 1


class TestLife:
    def test_many_threads(self, client):
        def work(number):
            for turn in range(50):
                given = np.full((1 + turn % 9, 2), number * 100 + turn)
                np.testing.assert_array_equal(client(given)[0], given * 2)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert client.dropped_replies == 0 and len(client_threads()) == 1

    def test_it_connects_only_when_used(self):
        before = len(client_threads())
        with InferenceClient("tcp://127.0.0.1:1"):
            assert len(client_threads()) == before

    def test_close_while_something_is_pending(self):
        with Server(lambda request: None) as server, ThreadPoolExecutor() as pool:
            client = InferenceClient(server.address, timeout=None)
            result = pool.submit(client, IDS)
            wait_for(lambda: server.kept)
            client.close()
            with pytest.raises(Unavailable, match="the client was closed"):
                result.result()
            client.close()
            assert not client_threads()
            with pytest.raises(Unavailable, match="was closed; make a new one"):
                client(IDS)

    def test_close_while_waiting_for_a_full_server(self):
        with Server(errors(*[Overloaded("full", 1e9)] * 9)) as server, ThreadPoolExecutor() as pool:
            client = InferenceClient(server.address, timeout=None)
            result = pool.submit(client, IDS)
            wait_for(lambda: server.seen)
            client.close()
            with pytest.raises(Unavailable, match="the client was closed"):
                result.result()

    def test_a_client_that_is_collected_ends_its_thread(self, server):
        client = InferenceClient(server.address, timeout=LONG)
        client(IDS)
        assert len(client_threads()) == 1
        del client
        gc.collect()
        wait_for(lambda: not client_threads())

    def test_an_idle_client_sleeps(self, client, monkeypatch):
        """Its thread waits without a time limit, so it takes no turns."""
        from propeller.service import connection

        turns = []
        real = connection._Loop.turn
        monkeypatch.setattr(
            connection._Loop, "turn", lambda loop: (turns.append(loop._sleep_ms()), real(loop))
        )
        client(IDS)
        wait_for(lambda: turns and turns[-1] is None)
        client(IDS)
        assert len(turns) < 100

    def test_a_thread_that_fails_leaves_nobody_waiting(self, client, monkeypatch, caplog):
        from propeller.service import connection

        with monkeypatch.context() as patched:
            patched.setattr(connection._Loop, "_send", lambda *_: 1 / 0)
            with pytest.raises(Unavailable, match="its thread failed .ZeroDivisionError"):
                client(IDS)
        assert "The thread of a client" in caplog.text
        np.testing.assert_array_equal(client(IDS)[0], IDS * 2)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_after_a_fork(self, client):
        large = np.ones((4, 100_000), np.float32)
        client(large)

        def child(end):
            mine = client(large + 1)[0]
            threads = len(client_threads())
            client.close()
            end.send((float(mine.max()), threads, len(client_threads())))

        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
        process.start()
        assert ours.poll(30) and ours.recv() == (4.0, 1, 0)
        process.join()
        assert process.exitcode == 0
        np.testing.assert_array_equal(client(IDS)[0], IDS * 2)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    def test_the_interpreter_ends_quietly(self, server):
        """With a call pending, and in a child that collects the client of its parent."""
        code = f"""
import os, threading, numpy, warnings
warnings.simplefilter("error")
from propeller.service.client import InferenceClient
client = InferenceClient({server.address!r}, timeout=None)
client(numpy.ones((4, 100_000)))
warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
pid = os.fork()
if pid == 0:
    del client
    import gc; gc.collect()
    raise SystemExit(3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
lost = InferenceClient("tcp://127.0.0.1:1", timeout=None)
threading.Thread(target=lambda: lost([1]), daemon=True).start()
client(numpy.ones((4, 100_000)))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@pytest.fixture
def keys(tmp_path):
    """Folders as `propeller-server keys` lays them out: of the server, of its client, of a stranger."""
    folder = {name: tmp_path / name for name in ("server", "client", "stranger", "confused")}
    for path in folder.values():
        path.mkdir()
    for name in ("server", "client", "stranger"):
        zmq.auth.create_certificates(tmp_path, name)
    allowed = folder["server"] / "clients"
    allowed.mkdir()
    shutil.copy(tmp_path / "client.key", allowed)
    layout = {
        "client": ("server", "client"),
        "stranger": ("server", "stranger"),
        "confused": ("stranger", "client"),
    }
    for name, (server, client) in layout.items():
        shutil.copy(tmp_path / f"{server}.key", folder[name] / "server.key")
        shutil.copy(tmp_path / f"{client}.key_secret", folder[name] / "client.key_secret")
        (folder[name] / "client.key_secret").chmod(0o600)

    @contextlib.contextmanager
    def secure(context, router):
        router.curve_publickey, router.curve_secretkey = zmq.auth.load_certificate(
            tmp_path / "server.key_secret"
        )
        router.curve_server = True
        keeper = ThreadAuthenticator(context)
        keeper.start()
        keeper.configure_curve(domain="*", location=str(allowed))
        try:
            yield
        finally:
            keeper.stop()

    with Server(secure=secure) as server:
        yield server, folder


class TestKeys:
    def test_the_right_ones(self, keys):
        server, folder = keys
        with InferenceClient(server.address, curve_keys=folder["client"], timeout=LONG) as client:
            np.testing.assert_array_equal(client(IDS)[0], IDS * 2)

    def test_refused_is_said_at_once_and_again(self, keys):
        server, folder = keys
        with InferenceClient(server.address, curve_keys=folder["stranger"], timeout=None) as client:
            for _ in range(3):
                with pytest.raises(Unavailable, match="the server refused the keys of this client"):
                    client(IDS)
            shutil.copy(folder["client"] / "client.key_secret", folder["stranger"])
            assert client.ping()["kind"] == "ping"

    def test_none_for_a_server_with_keys(self, keys):
        server, _ = keys
        with InferenceClient(server.address, timeout=None) as client:
            with pytest.raises(Unavailable, match="the server wants keys and this client has none"):
                client(IDS)

    def test_keys_for_a_server_without(self, keys, server):
        _, folder = keys
        with InferenceClient(server.address, curve_keys=folder["client"], timeout=None) as client:
            with pytest.raises(Unavailable, match="this client uses keys and the server does not"):
                client(IDS)

    def test_of_another_server(self, keys):
        server, folder = keys
        with InferenceClient(server.address, curve_keys=folder["confused"], timeout=0.3) as client:
            with pytest.raises(Unavailable, match=r"whose keys are not those of server\.key"):
                client(IDS)

    def test_keys_that_are_gone(self, keys):
        server, folder = keys
        with InferenceClient(server.address, curve_keys=folder["client"], timeout=None) as client:
            Path(folder["client"], "server.key").unlink()
            with pytest.raises(Unavailable, match=r"server\.key"):
                client(IDS)


class TestAsync:
    def test_every_method(self, server):
        async def work():
            async with AsyncInferenceClient(server.address, timeout=LONG, max_rows=4) as client:
                np.testing.assert_array_equal((await client(IDS))[0], IDS * 2)
                assert (await client.predict({"x": IDS}))["x"].shape == IDS.shape
                assert await client.answers(["a"]) == [{"echo": "a"}]
                assert (await client.outputs(["abc"]))["tokens"].shape == (1, 3)
                assert (await client.spec())["kind"] == "spec"
                assert (await client.ping())["kind"] == "ping"
                return [answers async for answers in client.map("answers", [["a"], ["b"]])]

        assert [answers[0]["echo"] for answers in asyncio.run(work())] == ["a", "b"]

    def test_gather(self, server):
        async def work():
            async with AsyncInferenceClient(server.address, timeout=LONG) as client:
                found = await asyncio.gather(*(client(np.full((3, 1), number)) for number in range(200)))
                assert [int(arrays[0][0, 0]) for arrays in found] == [2 * number for number in range(200)]

        asyncio.run(work())

    def test_errors(self, server):
        async def work():
            async with AsyncInferenceClient(server.address, timeout=LONG) as client:
                with pytest.raises(BadRequest, match="zero rows"):
                    await client([])
                server.script = errors(WorkerDied("gone"))
                with pytest.raises(WorkerDied, match="gone"):
                    await client(IDS)
                found = client.map("answers", [["a"], [], ["b"]], return_errors=True)
                assert [type(result) async for result in found] == [list, BadRequest, list]
                with pytest.raises(BadRequest):
                    async for _ in client.map("answers", [[]]):
                        pass
                server.script = lambda request: None
                with pytest.raises(Unavailable, match="the connection stands"):
                    await client(IDS, timeout=0.1)

        asyncio.run(work())

    def test_a_slow_consumer_gets_what_came_in_time(self, server, monkeypatch):
        async def work():
            async with AsyncInferenceClient(server.address, timeout=LONG) as client:
                results = client.map("answers", [["a"], ["b"]])
                found = [await anext(results)]
                await client.ping()  # answered after both
                monkeypatch.setattr(Deadline, "left", 0.0)
                return found + [answers async for answers in results]

        assert len(asyncio.run(work())) == 2

    def test_cancellation_gives_up_the_request(self):
        async def work():
            async with AsyncInferenceClient(server.address, timeout=LONG, max_rows=2) as client:
                task = asyncio.create_task(client(IDS))
                await asyncio.to_thread(wait_for, lambda: len(server.kept) == 3)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                server.script = whole
                server.release()
                np.testing.assert_array_equal((await client(IDS))[0], IDS * 2)
                assert client.dropped_replies == 3

        with Server(lambda request: None) as server:
            asyncio.run(work())

    def test_several_event_loops(self, server):
        client = AsyncInferenceClient(server.address, timeout=LONG)

        async def work(number):
            return int((await client(np.full((1, 1), number)))[0][0, 0])

        assert asyncio.run(work(1)) == 2
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda number: asyncio.run(work(number)), range(6))) == [0, 2, 4, 6, 8, 10]
        asyncio.run(client.close())

    def test_an_event_loop_that_ends_with_a_request_pending(self, caplog):
        async def leave():
            asyncio.get_running_loop().create_task(client(IDS))
            await asyncio.to_thread(wait_for, lambda: server.kept)

        with Server(lambda request: None) as server:
            client = AsyncInferenceClient(server.address, timeout=LONG)
            asyncio.run(leave())
            server.script = whole
            server.release()
            assert asyncio.run(client.ping())["kind"] == "ping"
            asyncio.run(client.close())
        assert not caplog.records
