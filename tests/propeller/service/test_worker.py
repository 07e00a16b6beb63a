"""Workers: batches in, outputs and answers back, with a ROUTER in the place of the server."""

from __future__ import annotations

import dataclasses
import re
import socket

import numpy as np
import pytest

from ernie.tasks.classification import ClassificationProcessor
from propeller.bundle import read_bundle
from propeller.errors import ServiceError
from propeller.paddle.inference import Predictor
from propeller.service import worker
from propeller.service.frames import MessageReader, WireArray, to_frames
from propeller.service.host import ANNOUNCE, STOP
from propeller.service.spawn import HostSettings
from propeller.service.uplink import Uplink
from propeller.service.wire import REPLY_LIMITS
from propeller.service.worker import Model, in_time, warmup_batch
from propeller.version import __version__

HOST = "00000000000000aa"
POISON = np.array([[99, 0]], np.float32)


@pytest.fixture(scope="module")
def running(serve, host, linear_bundle):
    """A server with a host of two workers of two threads, which tests use one after the other."""
    server = serve()
    process = host(server, linear_bundle, num_workers=2, num_threads=2, warmup_shapes=((2, 1), (8, 1)))
    hello = server.next("host")
    return server, process, hello, {worker.id: worker for worker in server.workers(2)}


class TestBatches:
    def test_who_comes(self, running, linear_bundle):
        _, process, hello, workers = running
        assert hello.header["kind"] == "host" and hello.id == HOST
        about = {"model": "m", "bundle": read_bundle(linear_bundle).hash, "version": __version__}
        assert {**about, "num_workers": 2}.items() <= hello.header.items()
        assert {name.rpartition(".")[0] for name in workers} == {HOST}
        assert all(worker.header["host"] == HOST for worker in workers.values())
        pids = {worker.header["pid"] for worker in workers.values()}
        assert len(pids) == 2 and process.pid not in pids

    def test_outputs_are_the_predictors(self, running, numbers):
        server, _, _, workers = running
        for number, one in enumerate(list(workers.values()) * 2):
            reply = server.batch(one, number, {"x": numbers.x})
            assert reply.header["kind"] == "done" and reply.header["seconds"] > 0
            assert reply.arrays.keys() == {"y"} and not reply.answers
            np.testing.assert_allclose(reply.arrays["y"], numbers.y, atol=1e-6)

    def test_a_failed_batch_harms_no_other(self, running, numbers):
        server, _, _, workers = running
        one = next(iter(workers.values()))
        poison = server.batch(one, 1, {"x": POISON})
        assert poison.header["kind"] == "failed" and "but got 99" in poison.header["problem"]
        assert "\n" not in poison.header["problem"] and len(poison.header["problem"]) <= 300
        assert server.batch(one, 2, {"z": numbers.x}).header["kind"] == "failed"
        answers = server.batch(one, 3, {"x": numbers.x}, finish=[0])
        assert "without a processor" in answers.header["problem"]
        server.check([one], numbers)

    def test_what_cannot_be_read_is_passed_over(self, running, numbers):
        server, _, _, workers = running
        one = next(iter(workers.values()))
        server.socket.send_multipart([one.address, b"no header"])
        server.check([one], numbers)

    def test_a_large_batch(self, running, linear_bundle):
        """More than ZMQ copies: the frames are the arrays' own memory."""
        server, _, _, workers = running
        x = np.random.default_rng(1).random((50_000, 2), np.float32)
        wanted = Predictor(linear_bundle, num_threads=1).predict({"x": x})["y"]
        replies = [server.batch(one, 6, {"x": x}).arrays["y"] for one in workers.values()]
        for found in replies:
            np.testing.assert_allclose(found, wanted, atol=1e-6)


class TestEnds:
    """What a worker still does when it is told to end, with two batches before it."""

    @pytest.fixture
    def waiting(self, serve):
        server = serve()
        uplink = Uplink(server.endpoint, None)
        host_end, pipe = socket.socketpair()
        with host_end, pipe:
            batches = worker._batches(uplink, pipe, lambda: uplink.announce("ready", "w", {}))
            uplink.announce("ready", "w", {})
            while not uplink.is_announced:
                uplink.wait(30)
            ready = server.next("ready")
            for number in ("1", "2"):
                server.send(ready, "batch", number, finish=[], outputs=True)
            yield server, ready, host_end, batches, uplink
        uplink.close()

    def test_stop_of_the_host(self, waiting):
        _, _, host_end, batches, uplink = waiting
        found = [next(batches).id]
        uplink.wait(30)  # for the second
        host_end.sendall(STOP)
        assert found + [batch.id for batch in batches] == ["1", "2"]

    def test_stop_of_the_server(self, waiting):
        server, ready, _, batches, _ = waiting
        server.send(ready, "stop", "stop")
        assert [batch.id for batch in batches] == ["1", "2"]

    def test_death_of_the_host(self, waiting):
        _, _, host_end, batches, _ = waiting
        assert next(batches).id == "1"
        host_end.close()
        assert len(list(batches)) <= 1, "at most what it had begun to receive"

    def test_who_is_there(self, waiting):
        server, ready, host_end, batches, _ = waiting
        assert next(batches).id == "1"
        assert server.next("ready").address == ready.address, "at first"
        host_end.sendall(ANNOUNCE)
        assert next(batches).id == "2"
        server.send(ready, "stop", "stop")
        assert list(batches) == []
        assert server.next("ready").address == ready.address


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    """A model as a worker has it, in this process."""
    settings = HostSettings("ipc://x", HOST, "m", str(tiny_bundle), read_bundle(tiny_bundle).hash)
    model = Model(dataclasses.replace(settings, warmup_shapes=((2, 16), (4, 8))))
    assert len(list(model.load())) == 4
    return model


@pytest.fixture(scope="module")
def batch(tiny_bundle):
    return read_bundle(tiny_bundle).probe()[0]


def answered(model, arrays, **about):
    """What the model replies to a batch: header, arrays by name, answers."""
    header = {"id": "1", "kind": "batch", "finish": [], "outputs": True, **about}
    sent = to_frames(header, [WireArray(*item) for item in arrays.items()], None, ServiceError)
    reply = MessageReader(
        model.reply(MessageReader(sent, REPLY_LIMITS, ServiceError)), REPLY_LIMITS, ServiceError
    )
    found, _, answers = reply.payload({"answers": list})
    return reply.header, {array.name: array.values for array in found}, answers


class TestReplies:
    def test_answers_of_some_rows(self, tiny, batch, tiny_bundle):
        outputs = Predictor(tiny_bundle, num_threads=1).predict(batch)
        wanted = read_bundle(tiny_bundle).processor().finish(outputs)
        header, arrays, answers = answered(tiny, batch, finish=[1])
        assert header["kind"] == "done" and answers[0]["label"] == wanted[1]["label"] and len(answers) == 1
        assert answers[0]["probability"] == pytest.approx(wanted[1]["probability"], abs=1e-6)
        np.testing.assert_allclose(arrays["logits"], outputs["logits"], atol=1e-6)

    def test_without_arrays(self, tiny, batch):
        _, arrays, answers = answered(tiny, batch, finish=[1, 0], outputs=False)
        assert not arrays and len(answers) == 2

    @pytest.mark.parametrize(
        ("answers", "problem"),
        [
            ([{"probability": float("nan")}], "The answers cannot be sent as JSON"),
            ([{"probability": np.float32(1)}], "The answers cannot be sent as JSON"),
            ([], "The processor gave 0 answers for 1 rows"),
            (KeyError("logits"), r"'logits' \(KeyError\)"),
        ],
    )
    def test_what_a_processor_may_do(self, tiny, batch, monkeypatch, caplog, answers, problem):
        def finish(self, outputs):
            if isinstance(answers, Exception):
                raise answers
            return answers

        with monkeypatch.context() as patch:
            patch.setattr(ClassificationProcessor, "finish", finish)
            for _ in range(2):
                header, arrays, _ = answered(tiny, batch, finish=[0])
        assert sum(record.exc_info is not None for record in caplog.records) == isinstance(answers, KeyError)
        assert header["kind"] == "failed" and not arrays
        assert re.search(problem, header["problem"])
        assert answered(tiny, batch, finish=[0])[0]["kind"] == "done"


class TestWarmUp:
    def test_it_ends_in_time(self):
        """Each shape takes a second on this clock."""
        times = iter(range(100))
        shapes = [(1, 16), (2, 16), (4, 16), (8, 16)]
        assert list(in_time(shapes, 2.5, lambda: next(times))) == shapes[:2]
        assert list(in_time(shapes, 0.0, lambda: 0.0)) == []
        assert list(in_time(shapes, 10.0, lambda: 0.0)) == shapes

    def test_batches_are_of_the_shape_and_of_real_values(self, tiny_bundle, batch):
        bundle = read_bundle(tiny_bundle)
        made = warmup_batch(bundle.inputs, batch, bundle.axis_limits, 5, 12)
        assert {array.shape for array in made.values()} == {(5, 12)}
        for name, array in made.items():
            assert array.dtype == batch[name].dtype and np.isin(array, batch[name]).all()
        long = warmup_batch(bundle.inputs, batch, bundle.axis_limits, 1, 99)
        assert {array.shape for array in long.values()} == {(1, 16)}, "no longer than the model takes"

    def test_axes_of_fixed_size_stay(self, linear_bundle):
        bundle = read_bundle(linear_bundle)
        made = warmup_batch(bundle.inputs, bundle.probe()[0], {}, 7, 64)
        assert made["x"].shape == (7, 2)
