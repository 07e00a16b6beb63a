"""Bad messages by the thousand: each gets one answer if it can be addressed, and nobody suffers."""

from __future__ import annotations

import collections
import os
import random
import re
import runpy
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from propeller.errors import BadRequest, ServerError
from propeller.paddle.inference import Predictor
from propeller.service.client import InferenceClient
from propeller.service.wire import Limits, Request, WireArray, decode_request, encode_request

Mutator = runpy.run_path(str(Path(__file__).with_name("test_wire.py")))["Mutator"]

PATIENCE_S = 30
# What a server says to learn whether a client is gone, also to one that is not: files are used again.
PROBE = "are you there?"
# What may be on its way to and from an attacker; sockets drop nothing up to 1000.
WINDOW = 200
NUM_ATTACKERS = 3
X = np.array([[1, 2], [3, 4.5], [0, -1]], np.float32)
IDS = {
    "sentence_ids": np.array([[1, 2, 19], [4, 0, 0]]), "token_type_ids": np.array([[0, 1, 1], [0, 0, 0]]),
    "position_ids": np.array([[0, 1, 2], [0, 0, 0]]), "input_mask": np.array([[1, 1, 1], [1, 0, 0]]),
}  # fmt: skip
NASTY = [0, 1, -1, 19, 20, 255, 2**31, 2**62, -(2**63), 0.5, np.nan, np.inf, -np.inf, 1e38, 1e300]
REAL = [
    Request("r1", arrays=(WireArray("x", X),)),
    Request("r2", arrays=(WireArray(None, X),), want="answers", deadline_ms=5000),
    Request("r3", model="four", arrays=tuple(WireArray(*item) for item in IDS.items())),
    Request("r4", model="tiny", raws=[{"text_a": "it is good"}, {"text_a": "bad"}]),
    Request("r5", model="tiny", raws=[{"text_a": "the hotel"}], want="arrays"),
    Request("r6", model="stage", raws=[{"x": [1, 2]}, {"x": [0.5, 7]}], deadline_ms=5000),
    Request("r7", "spec", model="four"),
    Request("r8", "ping"),
]


class Attacker:
    """Mutates real messages: bytes, frames, headers, and the values of arrays."""

    def __init__(self, seed, limits):
        self._random, self._limits = random.Random(seed), limits
        self._mutate = Mutator(seed, [[bytes(f) for f in encode_request(request)] for request in REAL])
        self.expected, self.codes, self.unreadable = collections.Counter(), collections.Counter(), 0

    def message(self):
        """A message, of which is noted what reply it must get."""
        frames = self._values() if self._random.random() < 0.3 else self._mutate()
        frames = frames or [b""]
        try:
            id = decode_request(frames, self._limits).id
        except BadRequest as error:
            id = error.request_id
        if id is None:
            self.unreadable += 1
        else:
            self.expected[id] += 1
        return frames

    def _values(self):
        """A well-made message, with values, types and shapes that may not be what the bundle takes."""
        request = self._random.choice([each for each in REAL if each.arrays])
        arrays = [array.values.copy() for array in request.arrays]
        for _ in range(self._random.choice([0, 1, 1, 3])):
            place = self._random.randrange(len(arrays))
            change = self._random.choice([self._one_value, self._dtype, self._shape, self._repeat])
            with np.errstate(all="ignore"):
                arrays[place] = change(arrays[place])
        names = [array.name for array in request.arrays]
        if self._random.random() < 0.1:
            self._random.shuffle(names)
        changed = tuple(WireArray(*item) for item in zip(names, arrays, strict=True))
        id = f"v{self._random.randrange(1000)}"
        made = Request(id, "predict", request.model, request.deadline_ms, changed, want=request.want)
        return [bytes(frame) for frame in encode_request(made)]

    def _one_value(self, array):
        if array.size and self._random.random() < 0.5:
            array = array.astype(self._random.choice([array.dtype, np.int64, np.float64]))
            value = np.float64(self._random.choice(NASTY))
            array.reshape(-1)[self._random.randrange(array.size)] = value.astype(array.dtype)
        return array

    def _dtype(self, array):
        return array.astype(self._random.choice(["bool", "int8", "uint64", "float16", "float64", "int32"]))

    def _shape(self, array):
        return self._random.choice([array[..., None], array[..., :-1], array[:0], array.ravel(), array.T])

    def _repeat(self, array):
        return np.repeat(array, self._random.choice([1, 5, 20]), axis=self._random.choice([0, -1]))

    def run(self, connect, count):
        """Sends so many and reads what comes; whatever comes was asked for, and comes once."""
        one, sent, on_their_way = connect(), 0, 0
        while sent < count or on_their_way:
            while sent < count and on_their_way < WINDOW:
                before = self.unreadable
                one.send(self.message())
                sent += 1
                on_their_way += self.unreadable == before
            if on_their_way:
                reply = one.receive()
                if reply.id == PROBE:
                    continue
                self.expected[reply.id] -= 1
                assert self.expected[reply.id] >= 0, f"{reply.id} is answered twice"
                self.codes["ok" if reply.error is None else reply.error.code] += 1
                on_their_way -= 1
        assert not +self.expected


def noise(server, stop, done, seed):
    """Connections that are not even ZeroMQ's, or that end in the middle of a word."""
    chance, (host, port) = random.Random(seed), server.address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + b"\0" * 8 + b"\x7f\3\0NULL" + b"\0" * 48
    while not stop.is_set():
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as made:
            start = chance.choice(
                [b"", b"GET / HTTP/1.1\r\n\r\n", greeting[: chance.randrange(65)], greeting]
            )
            try:
                made.sendall(start + chance.randbytes(chance.randrange(200)))
            except ConnectionError:
                pass  # the server was quicker
        done["noise"] += 1
        stop.wait(0.01)


def good_client(server, stop, done, stage, four):
    """Asks all the while, and compares."""
    pooled = four.predict(IDS)["pooled"]
    with (
        InferenceClient(server.address, timeout=PATIENCE_S) as first,
        InferenceClient(server.address, timeout=PATIENCE_S, model="four") as second,
        InferenceClient(server.address, timeout=PATIENCE_S, model="tiny") as third,
    ):
        (answer,) = third.answers(["it is good"])
        while not stop.is_set():
            x = X + done["good"] % 7
            np.testing.assert_allclose(first(x)[0], stage.y(x), rtol=1e-4)
            np.testing.assert_allclose(second.predict(IDS)["pooled"], pooled, atol=1e-5)
            (found,) = third.answers(["it is good"])
            assert found["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-5)
            done["good"] += 1


def resident_mb(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def num_files(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.parametrize(
    "num_messages", [6000, pytest.param(200_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_bad_messages_harm_nobody(
    num_messages, start_server, stage, four_bundle, tiny_bundle, dealer, wait_until
):
    models = {"stage": stage.bundles[0], "four": four_bundle, "tiny": tiny_bundle}
    words = [word for name, folder in models.items() for word in ("-m", f"{name}={folder}")]
    words += ["-p", 0, "--workers", 1, "--threads", 1, "--warmup-s", 0, "--metrics-port", 0]
    server = start_server(*words, "--max-message-mb", 1, "--max-queue", 1024).wait_ready()
    limits, pid = Limits(max_message_bytes=1 << 20, max_rows=1024), server.process.pid
    four, stop = Predictor(four_bundle, num_threads=1), threading.Event()
    files = num_files(pid)

    def attack(count, seeds):
        attackers = [Attacker(seed, limits) for seed in seeds]
        with ThreadPoolExecutor(NUM_ATTACKERS) as pool:
            running = [pool.submit(each.run, lambda: dealer(server.address), count) for each in attackers]
            for each in running:
                each.result()
        return attackers

    with ThreadPoolExecutor(2) as pool:
        done = collections.Counter(good=0, noise=0)
        busy = [
            pool.submit(good_client, server, stop, done, stage, four),
            pool.submit(noise, server, stop, done, 1),
        ]
        try:
            # What is loaded and cached once is there after these.
            attackers = attack(1000, range(NUM_ATTACKERS))
            before = resident_mb(pid)
            attackers += attack(num_messages // NUM_ATTACKERS, range(10, 10 + NUM_ATTACKERS))
            # On a busy machine the attack goes on until the good client, too, had its turns under it.
            while min(done.values()) <= 5 and not any(each.done() for each in busy):
                attackers += attack(100, range(20, 20 + NUM_ATTACKERS))
            after = resident_mb(pid)
        finally:
            stop.set()
            assert server.process.poll() is None, server.log()
        for each in busy:
            each.result()
    codes = sum((each.codes for each in attackers), collections.Counter())
    assert after - before < 16, f"the server grew from {before:.0f} to {after:.0f} MB"
    assert min(done.values()) > 5
    assert codes["ok"] > num_messages // 50 and codes["bad_request"] > num_messages // 3
    assert set(codes) <= {"ok", "bad_request", "deadline_exceeded", "overloaded", ServerError.code}
    unreadable = sum(each.unreadable for each in attackers)
    assert unreadable > num_messages // 50
    # Noise can look like a message to ZeroMQ, too.
    assert server.metric("dropped_messages_total", reason="unreadable") >= unreadable
    assert server.metric("worker_restarts_total") == 0 and server.metric("queued_rows") == 0
    one = dealer(server.address)
    assert one.ask(Request("r1", "ping")).result["status"] == "ready"
    one.close()
    wait_until(lambda: num_files(pid) <= files + NUM_ATTACKERS * 2 + 2, "closed connections")
    errors = re.findall(" ERROR .*", server.log())  # of processors that were given nonsense, each place once
    assert len(errors) < 20 and all("an input could not be answered" in line for line in errors), errors
    assert server.stop() == 0
