"""Clients of the chaos run that speak the wire by themselves, and what they say that is wrong."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import zmq
from serve_processes import HOST

from propeller.service.wire import Request, WireArray, encode_request

Frames = list[bytes]


@dataclasses.dataclass
class Tally:
    """What happened; all threads write into it.

    Attributes:
        outcomes: (kind of request, what came of it) to how often.
        replies: how many came by id, of the requests that were sent raw.
        unanswered: when raw requests without a reply were sent, on the clock.
        slowest: seconds, of any request.
        overdue: requests that took longer than they may.
    """

    outcomes: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    replies: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unanswered: list[float] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    overdue: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, kind: str, outcome: str, seconds: float, limit: float) -> None:
        """Counts one request, which took `seconds` and may take `limit`."""
        with self.lock:
            self.outcomes[kind, outcome] += 1
            self.slowest = max(self.slowest, seconds)
            self.overdue += seconds > limit


class RawClient:
    """A socket that counts what comes back.

    Args:
        port: the server's.
        name: makes its request ids its own.
        tally: where replies are counted.
    """

    def __init__(self, port: int, name: str, tally: Tally):
        self._name, self._numbers, self._tally = name, itertools.count(), tally
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://{HOST}:{port}")

    def new_id(self) -> str:
        """An id that nobody else uses."""
        return f"{self._name}.{next(self._numbers)}"

    def ask(self, request_id: str, frames: Sequence[bytes], timeout_s: float) -> Frames | None:
        """Sends a message and waits for the reply with its id; counts whatever else comes, too.

        Returns:
            The reply's frames; None if it did not come in time.
        """
        began = time.monotonic()
        self.send(frames)
        answer = self._receive(request_id, timeout_s)
        if answer is None:
            with self._tally.lock:
                self._tally.unanswered.append(began)
        return answer

    def send(self, frames: Sequence[bytes]) -> None:
        """Sends a message, whatever it is."""
        self._socket.send_multipart(frames)

    def _receive(self, request_id: str, timeout_s: float) -> Frames | None:
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            if self._socket.poll(max(1, int(left * 1000))):
                frames: Frames = self._socket.recv_multipart()
                found = str(json.loads(frames[0]).get("id"))
                with self._tally.lock:
                    self._tally.replies[found] += 1
                if found == request_id:
                    return frames
        return None

    def close(self, listen_s: float = 0.0) -> None:
        """Hangs up, after listening for replies that should not come."""
        self._receive("", listen_s)
        self._socket.close()


def good_request(request_id: str, texts: Sequence[str]) -> Frames:
    """A request for the vectors of texts."""
    raws = [{"text_a": text} for text in texts]
    return [bytes(frame) for frame in encode_request(Request(request_id, raws=raws, want="arrays"))]


class BadRequests:
    """Messages that are wrong, each in one way; all but the last can be addressed.

    Args:
        inputs: those of the server's `spec`.
    """

    def __init__(self, inputs: Sequence[Mapping[str, Any]]):
        self._inputs = inputs
        self._ways: list[Callable[[str], Frames]] = [
            lambda request_id: [*good_request(request_id, ["a"]), b"one frame more"],
            lambda request_id: [good_request(request_id, ["a"])[0], b'[{"text_a": 7}]'],
            lambda request_id: [good_request(request_id, ["a"])[0], b'[{"text": "a"}]'],
            lambda request_id: [good_request(request_id, ["a"])[0], b"[]"],
            lambda request_id: _changed(good_request(request_id, ["a"]), v=99),
            lambda request_id: _changed(good_request(request_id, ["a"]), kind="shutdown"),
            lambda request_id: _changed(good_request(request_id, ["a"]), deadline=1),
            lambda request_id: _changed(good_request(request_id, ["a"]), model="nobody"),
            lambda request_id: self._described(request_id, dtype="float128"),
            lambda request_id: self._described(request_id, shape=[2, 4]),
            lambda request_id: self._arrays(request_id, (0, 4), 0),
            lambda request_id: self._arrays(request_id, (1, 1 << 14), 0),
            lambda request_id: self._arrays(request_id, (4,), 0),
            lambda request_id: self._arrays(request_id, (1, 4), -1),
            lambda request_id: self._arrays(request_id, (1, 4), 1 << 40),
            lambda request_id: [b"not JSON"],
        ]

    def __len__(self) -> int:
        return len(self._ways)

    def make(self, way: int, request_id: str) -> tuple[Frames, bool]:
        """Returns the message, and whether an answer can be addressed."""
        return self._ways[way](request_id), way < len(self._ways) - 1

    def _arrays(self, request_id: str, shape: tuple[int, ...], value: int) -> Frames:
        arrays = tuple(WireArray(spec["name"], np.full(shape, value, spec["dtype"])) for spec in self._inputs)
        return [bytes(frame) for frame in encode_request(Request(request_id, arrays=arrays))]

    def _described(self, request_id: str, **entry: Any) -> Frames:
        frames = self._arrays(request_id, (1, 4), 1)
        arrays = json.loads(frames[0])["arrays"]
        return _changed(frames, arrays=[{**arrays[0], **entry}, *arrays[1:]])


def _changed(frames: Frames, **values: Any) -> Frames:
    return [json.dumps({**json.loads(frames[0]), **values}).encode(), *frames[1:]]
