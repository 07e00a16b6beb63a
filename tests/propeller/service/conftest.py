"""Small bundles, real hosts for them with a ROUTER in the place of the server, and real servers."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import re
import select
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families

from propeller.bundle import read_bundle
from propeller.errors import ServiceError
from propeller.service.auth import Authenticator, secure_server
from propeller.service.frames import MessageReader, WireArray, to_frames
from propeller.service.spawn import HostSettings, end_host, start_host
from propeller.service.wire import REPLY_LIMITS, decode_reply, encode_request

# What the texts of `tiny_bundle` are made of.
VOCABULARY = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "good", "bad", "is", "it", "the", "hotel")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """Folder of a bundle: ERNIE of one layer with a classifier of two labels, and its processor."""
    from ernie.config import ErnieConfig
    from ernie.tasks.classification import ClassificationProcessor
    from ernie.tasks.classification_model import ClassificationModel
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
            stack.callback(end_host, process)
            return process

        yield start


# Processes of the server itself


def wait_until(condition, what="it"):
    """Waits until a condition holds, and returns what it gave."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come to pass"
        select.select([], [], [], 0.005)
    return found


@pytest.fixture(scope="session", name="wait_until")
def _wait_until():
    """`wait_until(condition, what)` waits until it holds."""
    return wait_until


class Gate:
    """Where workers and hosts of the stage wait while it is closed; see `stage.pass_gate`."""

    def __init__(self, path):
        self._path, self._file = path, None

    def close(self):
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self):
        """Lets through whoever waits; does nothing if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        self.close()
        return self

    def __exit__(self, *_):
        self.open()


class Stage:
    """The package of `stage.py`: its module, where it is installed, and bundles of it.

    Attributes:
        module: `stage.py`.
        folder: of the package.
        bundles: two versions of a model, `x` float32 `[batch, 2]` -> `y` float32 `[batch, 3]` and `command`
            float32 `[batch]`, the first number of the row.
    """

    def __init__(self, folder):
        self.folder = folder
        sys.path.append(str(folder))
        self.module = self.install("stage", "Stage")
        self.bundles = [_export_stage(folder / f"v{seed}", seed, self.module.Stage()) for seed in (1, 2)]

    def install(self, name, processor):
        """Makes a module of this folder, which defines a processor of its name, an installed package."""
        (self.folder / f"{name}.py").write_bytes(Path(__file__).with_name(f"{name}.py").read_bytes())
        about = self.folder / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[propeller.processors]\n{name} = {name}:{processor}\n")
        importlib.invalidate_caches()
        return importlib.import_module(name)

    def y(self, x, version=0):
        """What a version makes of rows."""
        weight, bias = self._weights(version)
        return np.asarray(x, np.float32) @ weight + bias

    @functools.cache  # noqa: B019 - one object a session
    def _weights(self, version):
        from propeller.paddle.inference import Predictor

        x = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
        y = Predictor(self.bundles[version], num_threads=1).predict({"x": x})["y"]
        return y[1:] - y[0], y[0]


def _export(folder, seed, model_class, columns, processor=None):
    """Exports an untrained model into a new folder, which is returned."""
    from propeller.paddle.runtime import paddle
    from propeller.paddle.train.exporter import export_bundle
    from propeller.types import HParams, RunConfig, RunMode

    paddle.seed(seed)
    folder.mkdir()
    model = model_class(HParams(), RunMode.PREDICT, RunConfig())
    export_bundle(folder, model, columns, processor=processor, metrics={})
    return folder


def _model_class(inputs, **members):
    """A model that is never trained."""
    import propeller.paddle as propeller

    def never(self, *_):
        raise NotImplementedError

    return type("Toy", (propeller.Model,), {"inputs": inputs, "loss": never, "optimizer": never, **members})


def _export_stage(folder, seed, processor):
    import propeller.paddle as propeller
    from propeller.paddle.runtime import paddle

    def init(self, *args):
        propeller.Model.__init__(self, *args)
        self.out = paddle.nn.Linear(2, 3)

    def forward(self, features):
        return {"y": self.out(features["x"]), "command": features["x"][:, 0]}

    inputs = (propeller.ArraySpec("x", "float32", ("batch", 2)),)
    model_class = _model_class(inputs, __init__=init, forward=forward)
    return _export(folder, seed, model_class, {"x": np.ones((4, 2), np.float32)}, processor)


@pytest.fixture(scope="session")
def four_bundle(tmp_path_factory):
    """Four inputs int64 `[batch, seq_len]` -> `tokens` float32 `[batch, seq_len, 4]`, `pooled` `[batch, 4]`.

    It masks what is padding. Ids go to 19, types to 1, sequences to 40 tokens.
    """
    import propeller.paddle as propeller
    from propeller.paddle.runtime import paddle

    sizes = {"sentence_ids": 20, "token_type_ids": 2, "position_ids": 40}

    def init(self, *args):
        propeller.Model.__init__(self, *args)
        self.tables = paddle.nn.LayerDict(
            {name: paddle.nn.Embedding(size, 4) for name, size in sizes.items()}
        )

    def forward(self, features):
        mask = features["input_mask"].astype("float32").unsqueeze(-1)
        tokens = sum(table(features[name]) for name, table in self.tables.items()) * mask
        return {"tokens": tokens, "pooled": tokens.sum(axis=1) / mask.sum(axis=1)}

    axes = ("batch", "seq_len")
    specs = tuple(
        propeller.ArraySpec(name, "int64", axes, max_value=size - 1) for name, size in sizes.items()
    )
    specs += (propeller.ArraySpec("input_mask", "int64", axes),)
    model_class = _model_class(specs, __init__=init, forward=forward, axis_limits={"seq_len": 40})
    columns = {spec.name: np.ones((4, 12), np.int64) for spec in specs}
    return _export(tmp_path_factory.mktemp("four") / "bundle", 7, model_class, columns)


@pytest.fixture(scope="session")
def mean_bundle(tmp_path_factory):
    """`ids` int64 `[batch, seq_len]` -> `mean` float32 `[batch, 4]`, over padding, too, which so counts."""
    import propeller.paddle as propeller
    from propeller.paddle.runtime import paddle

    def init(self, *args):
        propeller.Model.__init__(self, *args)
        self.table = paddle.nn.Embedding(20, 4)

    def forward(self, features):
        return {"mean": self.table(features["ids"]).mean(axis=1)}

    inputs = (propeller.ArraySpec("ids", "int64", ("batch", "seq_len"), max_value=19),)
    model_class = _model_class(inputs, __init__=init, forward=forward)
    columns = {"ids": np.arange(36, dtype=np.int64).reshape(3, 12) % 20}
    return _export(tmp_path_factory.mktemp("mean") / "bundle", 8, model_class, columns)


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """The package that tests have workers die with."""
    made = Stage(tmp_path_factory.mktemp("stage"))
    yield made
    sys.path.remove(str(made.folder))


@pytest.fixture(scope="session")
def toy_windows(stage):
    """The module `toy_windows.py`, an installed package."""
    return stage.install("toy_windows", "ToyWindows")


@pytest.fixture(scope="session")
def windows_bundle(toy_windows, tmp_path_factory):
    """`ids` int64 `[batch, seq_len]` -> their sum, `total`, and the `first`, both float32 `[batch]`."""
    import propeller.paddle as propeller
    from propeller.paddle.runtime import paddle

    def init(self, *args):
        propeller.Model.__init__(self, *args)
        self.weight = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(1.0))

    def forward(self, features):
        ids = features["ids"].astype("float32") * self.weight
        return {"total": ids.sum(axis=1), "first": ids[:, 0]}

    inputs = (propeller.ArraySpec("ids", "int64", ("batch", "seq_len")),)
    model_class = _model_class(inputs, __init__=init, forward=forward)
    columns = {"ids": np.arange(1, 13, dtype=np.int64).reshape(3, 4)}
    folder = tmp_path_factory.mktemp("windows") / "bundle"
    return _export(folder, 9, model_class, columns, toy_windows.ToyWindows())


class ServerProcess:
    """`python -m propeller.tools.start_server` with these words; a folder of its own is its TMPDIR.

    Attributes:
        process: the server.
        gates: `load` stops hosts that are about to load a bundle of the stage, `batch` its rows of `WAIT`,
            `join` what `toy_windows.py` joins. Those in `closed` are closed from the start.
    """

    def __init__(self, folder, words, path, closed=()):
        self.folder = folder
        self.gates = {name: Gate(folder / name) for name in ("load", "batch", "join")}
        for name in closed:
            self.gates[name].close()
        self._log = (folder / "log").open("w+")
        environment = {**os.environ, "TMPDIR": str(folder), "STAGE_GATES": str(folder), "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "propeller.tools.start_server", *map(str, words)],
            env=environment, stdout=subprocess.PIPE, stderr=self._log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self._output = b""

    def log(self):
        """What it logged so far."""
        return (self.folder / "log").read_text("utf-8", "replace")

    def logged(self, pattern):
        """Waits for a pattern in the log; what its group is."""
        return wait_until(lambda: re.search(pattern, self.log()), f"{pattern} in the log")[1]

    def wait_ready(self):
        """Waits for its line; itself."""
        stdout = self.process.stdout
        while b"\n" not in self._output:
            readable, _, _ = select.select([stdout], [], [], PATIENCE_S)
            assert readable, f"not ready:\n{self.log()}"
            read = os.read(stdout.fileno(), 4096)
            assert read, f"ended with status {self.process.wait(PATIENCE_S)}:\n{self.log()}"
            self._output += read
        return self

    @property
    def line(self):
        """What it printed when it was ready."""
        return self.wait_ready()._output.decode()

    @property
    def address(self):
        return self.line.split()[1]

    def http(self, path):
        """Status and text of a page on the port of metrics."""
        url = f"http://127.0.0.1:{self.logged(r'metrics and health on port (.+)')}{path}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as page:
                return page.status, page.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name, **labels):
        """A metric's value, summed up over labels that are not given."""
        families = text_string_to_metric_families(self.http("/metrics")[1])
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == f"propeller_{name}" and labels.items() <= sample.labels.items()
        )

    def hosts(self):
        """Pids of the processes that have the workers."""
        return children(self.process.pid)

    def workers(self):
        """Pids of all workers."""
        return [pid for host in self.hosts() for pid in children(host)]

    def private(self):
        """Private folders that are there."""
        return list(self.folder.glob("propeller-*"))

    def stop(self):
        """Has it end; its exit status."""
        for gate in self.gates.values():
            gate.open()
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def close(self):
        for gate in self.gates.values():
            gate.open()
        if self.process.poll() is None:
            pids = self.hosts() + self.workers()
            self.process.kill()
            self.process.wait()
            wait_for_end(*pids)
        self.process.stdout.close()
        self._log.close()


def children(pid):
    """Pids of the living children of a process."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(file.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def start_server(root, stage):
    """`start_server(*words, closed=())` starts one, which is killed in the end."""
    path = os.pathsep.join([str(root), str(stage.folder)])
    with contextlib.ExitStack() as stack:

        def start(*words, closed=()):
            # Not in pytest's folders: a path of a socket has at most 107 characters.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = ServerProcess(folder, words, path, closed)
            stack.callback(server.close)
            return server

        yield start


class Dealer:
    """A client that sends frames as they are."""

    def __init__(self, address):
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(address)

    def send(self, request):
        self.socket.send_multipart(request if isinstance(request, list) else encode_request(request))

    def receive(self):
        while True:
            assert self.socket.poll(PATIENCE_S * 1000), "no reply came"
            reply = decode_reply(self.socket.recv_multipart())
            # So a server asks who may be gone, such as one whose connection has the number of another one
            # that has just ended. Clients drop what they did not ask for.
            if reply.id != "are you there?":
                return reply

    def ask(self, request):
        self.send(request)
        return self.receive()

    def close(self):
        """Goes without a word; does nothing the second time."""
        self.socket.close()
        self._context.term()


@pytest.fixture
def dealer():
    """`dealer(address)` connects one."""
    with contextlib.ExitStack() as stack:

        def connect(address):
            made = Dealer(address)
            stack.callback(made.close)
            return made

        yield connect
