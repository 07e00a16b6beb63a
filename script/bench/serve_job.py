"""What `serve.py` gives the processes that it starts and gets back; in Python and numpy, for all of them.

A *load* is clients that ask a server all at once, in a process of their own, since they cost time too. An
*offline* peer is a process that answers without a server:

    stdout: {"ready": versions}
    stdin:  {"work": path, "out": path | null}     stdout: {"seconds": [one for each call]}     and so on
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

# What does the work of a file and returns the seconds of each call; what then returns the vectors; versions.
Loaded = tuple[Callable[[Path], list[float]], Callable[[], np.ndarray], dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Load:
    """What clients do in one turn.

    Attributes:
        host, port: where the server is.
        texts: all that is asked for, in order.
        rows: texts a request.
        clients: so many are connected.
        in_flight: requests that each has unanswered.
        uncounted: requests, the first ones, that are asked once before the clock runs.
    """

    host: str
    port: int
    texts: list[str]
    rows: int
    clients: int
    in_flight: int
    uncounted: int

    @property
    def requests(self) -> list[list[str]]:
        """The texts of each request."""
        return [self.texts[start : start + self.rows] for start in range(0, len(self.texts), self.rows)]


@dataclasses.dataclass(frozen=True)
class Turn:
    """What came of it.

    Attributes:
        seconds: from the first request to the last reply.
        latencies: of each request, in seconds.
        client_cpu_seconds: what the clients' process used in that time.
    """

    seconds: float
    latencies: list[float]
    client_cpu_seconds: float = 0.0


def run_load(description: str, drive: Callable[[Load, argparse.Namespace], tuple[Turn, np.ndarray]]) -> None:
    """Parses the flags of a load's script, runs it, and writes what came of it.

    Args:
        description: for `--help`.
        drive: does what the load says; returns the turn, and the vectors in order, float32 [texts, dim].
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--job", type=Path, required=True, help="JSON file, as serve.py writes it")
    parser.add_argument("--out", type=Path, required=True, help="where the report goes; .npy beside it")
    parser.add_argument("--vocab", type=Path, help="tokenise on the client")
    args = parser.parse_args()
    turn, vectors = drive(Load(**json.loads(args.job.read_text())), args)
    np.save(args.out.with_suffix(".npy"), vectors)
    args.out.write_text(json.dumps(dataclasses.asdict(turn)))


def ask_in_threads(
    calls: Sequence[Callable[[list[str]], np.ndarray]], requests: Sequence[list[str]], in_flight: int
) -> tuple[Turn, list[np.ndarray]]:
    """Shares requests out among clients that block.

    Args:
        calls: one for each client.
        requests: the texts of each.
        in_flight: threads for each client.

    Returns:
        The turn, and the reply to each request.
    """
    numbers = itertools.count()  # next() on it is one step: no lock needed
    replies: list[np.ndarray] = [np.empty(0)] * len(requests)
    latencies = [0.0] * len(requests)
    failed: list[BaseException] = []

    def ask(call: Callable[[list[str]], np.ndarray]) -> None:
        try:
            while not failed and (number := next(numbers)) < len(requests):
                began = time.perf_counter()
                replies[number] = call(requests[number])
                latencies[number] = time.perf_counter() - began
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(call,)) for call in calls for _ in range(in_flight)]
    cpu, began = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    turn = Turn(time.perf_counter() - began, latencies, time.process_time() - cpu)
    if failed:
        raise failed[0]
    return turn, replies


@contextlib.contextmanager
def answers_only() -> Iterator[Callable[[object], None]]:
    """Keeps stdout for answers, whatever libraries print; gives what writes one."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def write(answer: object) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        yield write


def serve_offline(
    load: Callable[[], Loaded],
) -> None:
    """Answers on stdin and stdout until stdin ends.

    Args:
        load: loads the model.
    """
    with answers_only() as write:
        run, vectors, versions = load()
        write({"ready": versions})
        for line in sys.stdin:
            message = json.loads(line)
            seconds = run(Path(message["work"]))
            if message["out"]:
                np.save(message["out"], vectors())
            write({"seconds": seconds})
