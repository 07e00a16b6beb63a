"""Two small bundles, real hosts for them, and a ROUTER in the place of the server."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zmq

from propeller.bundle import read_bundle
from propeller.errors import ServiceError
from propeller.service.auth import Authenticator, secure_server
from propeller.service.frames import MessageReader, WireArray, to_frames
from propeller.service.host import HostSettings, start_host
from propeller.service.wire import REPLY_LIMITS

# What the texts of `tiny_bundle` are made of.
VOCABULARY = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "good", "bad", "is", "it", "the", "hotel")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """Folder of a bundle: ERNIE of one layer with a classifier of two labels, and its processor."""
    from ernie.config import ErnieConfig
    from ernie.tasks.classification import ClassificationProcessor
    from ernie.tasks.models import ClassificationModel
    from ernie.tokenizing import load_tokenizer
    from propeller.data import pad_batch
    from propeller.paddle.runtime import paddle
    from propeller.paddle.train.exporter import export_bundle
    from propeller.types import HParams, RunConfig, RunMode

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY), "utf-8")
    tokenizer = load_tokenizer(None, vocab_file=folder / "vocab.txt")
    processor = ClassificationProcessor(tokenizer, ["no", "yes"], max_seqlen=16, pair=False)
    config = ErnieConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    paddle.seed(5)
    model = ClassificationModel(HParams(), RunMode.PREDICT, RunConfig(), config=config, processor=processor)
    examples = processor.prepare([{"text_a": "it is good"}, {"text_a": "the hotel is bad bad"}])
    (folder / "bundle").mkdir()
    columns = pad_batch(examples, pad_values=processor.pad_values)
    export_bundle(folder / "bundle", model, columns, processor=processor, metrics={})
    return folder / "bundle"


@pytest.fixture(scope="session")
def linear_bundle(tmp_path_factory):
    """Folder of a bundle without processor: `x` float32 `[batch, 2]` -> `y` float32 `[batch, 3]`.

    A row of which the first number is 10 or more makes it raise.
    """
    import propeller.paddle as propeller
    from propeller.paddle.runtime import paddle
    from propeller.paddle.train.exporter import export_bundle

    class Linear(propeller.Model):
        inputs = (propeller.ArraySpec("x", "float32", ("batch", 2)),)

        def __init__(self, *args):
            super().__init__(*args)
            self.out = paddle.nn.Linear(2, 3)
            self.table = paddle.nn.Embedding(10, 3)

        def forward(self, features):
            x = features["x"]
            return {"y": self.out(x) + self.table(x[:, 0].abs().astype("int64"))}

        def loss(self, predictions, labels):
            return paddle.nn.functional.mse_loss(predictions["y"], labels)

        def optimizer(self):
            return paddle.optimizer.SGD(parameters=self.parameters())

    paddle.seed(6)
    model = Linear(propeller.HParams(), propeller.RunMode.PREDICT, propeller.RunConfig())
    folder = tmp_path_factory.mktemp("linear")
    export_bundle(folder, model, {"x": np.ones((4, 2), np.float32)}, processor=None, metrics={})
    return folder


class Numbers(NamedTuple):
    """A batch of `linear_bundle`, and what its predictor makes of it."""

    x: np.ndarray
    y: np.ndarray


@pytest.fixture(scope="session")
def numbers(linear_bundle):
    from propeller.paddle.inference import Predictor

    x = np.array([[1, 2], [3, 4.5], [0, -1]], np.float32)
    return Numbers(x, Predictor(linear_bundle, num_threads=1).predict({"x": x})["y"])


HOST = "00000000000000aa"
PATIENCE_S = 30


class Message(NamedTuple):
    address: bytes
    header: dict
    arrays: dict
    answers: list | None

    @property
    def id(self):
        return self.header["id"]


class Server:
    """The server's side of hosts and workers."""

    def __init__(self, endpoint, keys=None):
        self._context = zmq.Context()
        self._authenticator = Authenticator(self._context, keys) if keys else contextlib.nullcontext()
        self._authenticator.__enter__()
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys:
            secure_server(self.socket, keys, "worker")
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def next(self, *kinds):
        """Waits for a message of one of these kinds; beats are passed over, nothing else may come."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            left = deadline - time.monotonic()
            assert left > 0 and self.socket.poll(left * 1000), f"no {kinds} came"
            address, *frames = self.socket.recv_multipart()
            reader = MessageReader(frames, REPLY_LIMITS, ServiceError)
            arrays, _, answers = reader.payload({"answers": list})
            kind = reader.header["kind"]
            if kind in kinds:
                return Message(address, reader.header, dict(arrays), answers)
            assert kind == "beat", reader.header

    def workers(self, count):
        """Waits until so many are ready; their messages."""
        return [self.next("ready") for _ in range(count)]

    def send(self, to, kind, id, arrays=None, **about):
        named = [WireArray(*item) for item in (arrays or {}).items()]
        header = {"id": id, "kind": kind, **about}
        self.socket.send_multipart([to.address, *to_frames(header, named, None, ServiceError)])

    def batch(self, worker, number, arrays, finish=(), outputs=True):
        """Has a worker run a batch; its reply."""
        self.send(worker, "batch", str(number), arrays, finish=list(finish), outputs=outputs)
        reply = self.next("done", "failed")
        assert reply.id == str(number) and reply.address == worker.address
        return reply

    def check(self, workers, numbers):
        """Has each worker run the batch of `numbers` and compares what comes."""
        for worker in workers:
            found = self.batch(worker, 7, {"x": numbers.x}).arrays["y"]
            np.testing.assert_allclose(found, numbers.y, atol=1e-6)

    def close(self):
        self.socket.close()
        self._authenticator.__exit__(None, None, None)
        self._context.term()


def wait_for_end(*pids):
    """Waits for the end of processes that are not children of this one."""
    deadline = time.monotonic() + PATIENCE_S
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        readable, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
        os.close(descriptor)
        assert readable, f"process {pid} still lives"


@pytest.fixture(scope="session")
def gone():
    """`gone(*pids)` waits for the end of processes that are not children of this one."""
    return wait_for_end


@pytest.fixture(scope="module")
def place():
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def serve(place):
    """`serve()` gives a server on an address of its own."""
    with contextlib.ExitStack() as stack:
        numbers = iter(range(100))

        def start(endpoint=None, keys=None):
            server = Server(endpoint or f"ipc://{place}/{next(numbers)}", keys)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture(scope="module")
def host():
    """`host(server, folder, **settings)` starts one; it is killed in the end, its workers follow."""
    with contextlib.ExitStack() as stack:

        def start(server, folder, script=None, **more):
            given = {"host_id": HOST, "model": "m", "bundle_hash": read_bundle(folder).hash, **more}
            settings = HostSettings(server.endpoint, folder=str(folder), **given)
            if script is None:
                process = start_host(settings)
            else:
                command = [sys.executable, "-c", script[0], settings.to_json(), str(script[1])]
                process = subprocess.Popen(command, env=settings.environment(), stdin=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start
