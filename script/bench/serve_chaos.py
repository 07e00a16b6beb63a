"""The chaos run of `serve.py`: what becomes of every request while workers and the server are killed.

Many threads ask our server for vectors that are known. Most use `ErnieClient`; some speak the wire by
themselves, so that replies are counted by request id. Some of what they send is wrong, and some clients are
gone before the answer comes. Every so many requests a worker is killed by `kill -9`, and once the server is
restarted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Sequence

import numpy as np
from serve_contenders import ENCODER_SERVER
from serve_processes import HOST, Process, descendants, free_port, our_server
from serve_raw import BadRequests, RawClient, Tally, good_request
from serve_speed import similarity

from ernie.service.client import ErnieClient
from propeller.errors import BadRequest, DeadlineExceeded, Draining, Overloaded, ServiceError
from propeller.service.client import InferenceClient
from propeller.service.wire import decode_reply

_POOL_TEXTS, _MAX_ROWS, _NUM_CLIENTS = 512, 16, 4
_RAW_SHARE, _VANISHING_SHARE = 0.22, 0.03
_TIMEOUT_S, _GRACE_S = 30.0, 15.0
# A connection that breaks may swallow what is on its way, and a raw client does not ask again. So long after
# the server is back all have a new one.
_RECONNECT_S = 2.0
_MIN_COSINE = 0.9999
# Bad ones are answered so; the others are what the server may say to anybody.
_REFUSED = {error.__name__ for error in (BadRequest, Overloaded, Draining, DeadlineExceeded)}


class Chaos:
    """The clients.

    Args:
        args: the flags.
        port: the server's.
        texts: what is asked for; their vectors are fetched before anything is killed.

    Attributes:
        asked: requests that were begun.
        tally: what came of them.
    """

    def __init__(self, args: argparse.Namespace, port: int, texts: Sequence[str]):
        self._args, self._port, self._texts = args, port, list(texts)
        self.tally, self.asked, self._numbers = Tally(), 0, itertools.count()
        with InferenceClient(f"tcp://{HOST}:{port}", timeout=_TIMEOUT_S) as client:
            self._bad = BadRequests(client.spec()["inputs"])
        self._clients = [ErnieClient(host=HOST, port=port, timeout=_TIMEOUT_S) for _ in range(_NUM_CLIENTS)]
        self._vectors = np.asarray(self._clients[0](self._texts))

    def work(self, place: int) -> None:
        """One thread: takes numbers until there are none left; what a number asks for is settled by it."""
        client, raw = self._clients[place % _NUM_CLIENTS], RawClient(self._port, f"t{place}", self.tally)
        while (number := next(self._numbers)) < self._args.requests:
            self.asked = max(self.asked, number + 1)
            rng = random.Random(number)
            others = (_RAW_SHARE, self._args.bad_share, _VANISHING_SHARE)
            (kind,) = rng.choices(("ErnieClient", "raw", "bad", "vanishing"), (1 - sum(others), *others))
            rows = rng.sample(range(len(self._texts)), rng.randint(1, min(_MAX_ROWS, len(self._texts))))
            began = time.monotonic()
            try:
                if kind == "ErnieClient":
                    outcome = self._judge(client([self._texts[row] for row in rows]), rows)
                elif kind == "raw":
                    outcome = self._ask_raw(raw, rows)
                elif kind == "bad":
                    outcome = self._ask_bad(raw, rng)
                else:
                    outcome = self._vanish(rows, rng)
            except ServiceError as error:
                outcome = type(error).__name__
            self.tally.add(kind, outcome, time.monotonic() - began, _TIMEOUT_S + _GRACE_S)
        raw.close(listen_s=2.0)

    def _judge(self, vectors: np.ndarray, rows: list[int]) -> str:
        wanted = self._vectors[rows]
        if vectors.shape != wanted.shape or not (similarity(vectors, wanted) > _MIN_COSINE).all():
            return "WRONG"
        return "right"

    def _ask_raw(self, raw: RawClient, rows: list[int]) -> str:
        request_id = raw.new_id()
        frames = raw.ask(request_id, good_request(request_id, [self._texts[row] for row in rows]), _TIMEOUT_S)
        if frames is None:
            return "no reply"
        reply = decode_reply(frames)
        if reply.error is not None:
            raise reply.error
        return self._judge(reply.arrays[0].values, rows)

    def _ask_bad(self, raw: RawClient, rng: random.Random) -> str:
        request_id = raw.new_id()
        frames, addressed = self._bad.make(rng.randrange(len(self._bad)), request_id)
        if not addressed:
            raw.send(frames)
            return "sent, cannot be answered"
        answer = raw.ask(request_id, frames, _TIMEOUT_S)
        if answer is None:
            return "no reply"
        error = decode_reply(answer).error
        return type(error).__name__ if type(error).__name__ in _REFUSED else "TAKEN"

    def _vanish(self, rows: list[int], rng: random.Random) -> str:
        gone = RawClient(self._port, f"gone{rows[0]}.{rng.random()}", self.tally)
        gone.send(good_request(gone.new_id(), [self._texts[row] for row in rows]))
        # Long enough for the request to leave, too short for most to be answered.
        gone.close(listen_s=rng.uniform(0.001, 0.02))
        return "gone"

    def close(self) -> None:
        """Hangs up."""
        for client in self._clients:
            client.close()


class Trouble(contextlib.AbstractContextManager["Trouble"]):
    """A server whose workers are killed, and that is restarted once, as requests go by.

    Args:
        args: the flags.
        port: stays the same after the restart.

    Attributes:
        killed, restarts: how often.
        down: from when to when there was no server, on the clock.
    """

    def __init__(self, args: argparse.Namespace, port: int):
        self._args, self._port = args, port
        self._stack, self._rng = contextlib.ExitStack(), random.Random(0)
        self._server = self._start()
        self.killed, self.restarts, self.down = 0, 0, (0.0, 0.0)

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start(self) -> Process:
        return self._stack.enter_context(our_server(ENCODER_SERVER, self._args.model, self._port))

    def watch(self, chaos: Chaos, threads: Sequence[threading.Thread]) -> None:
        """Makes trouble until all threads have ended, or none has asked anything for too long."""
        next_kill, half = self._args.kill_every, self._args.requests // 2
        asked, since = 0, time.monotonic()
        while any(thread.is_alive() for thread in threads):
            if chaos.asked >= half and not self.restarts:
                self._restart()
            if chaos.asked >= next_kill:
                self._kill()
                next_kill += self._args.kill_every
            if chaos.asked != asked:
                asked, since = chaos.asked, time.monotonic()
            if time.monotonic() - since > 2 * (_TIMEOUT_S + _GRACE_S):
                return
            time.sleep(0.01)

    def _kill(self) -> None:
        end = time.monotonic() + _GRACE_S
        while time.monotonic() < end:
            # Workers are forked by the host, which the server started.
            workers = [pid for pid, depth in descendants(self._server.pid).items() if depth == 2]
            if workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._rng.choice(workers), signal.SIGKILL)
                    self.killed += 1
                return
            time.sleep(0.01)

    def _restart(self) -> None:
        began = time.monotonic()
        self._stack.close()
        self._server = self._start()
        self.restarts, self.down = self.restarts + 1, (began, time.monotonic())


def run_chaos(args: argparse.Namespace, texts: Sequence[str]) -> bool:
    """Runs it and prints what came of it.

    Returns:
        Whether every good request got its right answer or a typed error, and none hung or had two.
    """
    port = free_port()
    with Trouble(args, port) as trouble:
        chaos = Chaos(args, port, texts[:_POOL_TEXTS])
        threads = [
            threading.Thread(target=chaos.work, args=(place,), daemon=True) for place in range(args.threads)
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        trouble.watch(chaos, threads)
        hanging = sum(thread.is_alive() for thread in threads)
        seconds = time.monotonic() - began
        chaos.close()
    down_s = trouble.down[1] - trouble.down[0]
    print(f"\n{args.requests} requests of 1 to {_MAX_ROWS} texts, {args.threads} threads, {seconds:.0f} s")
    print(f"workers killed: {trouble.killed}; server restarted {trouble.restarts} time(s), in {down_s:.1f} s")
    return report(chaos.tally, hanging, trouble.down)


def report(tally: Tally, hanging: int, down: tuple[float, float]) -> bool:
    """Prints what happened to requests of each kind; returns whether it is what was asked for."""
    print("\n| requests | outcome | number |\n|---|---|---|")
    for (kind, outcome), count in sorted(tally.outcomes.items()):
        print(f"| {kind} | {outcome} | {count} |")
    first, last = down
    sums: collections.Counter[str] = collections.Counter()
    for (_, outcome), count in tally.outcomes.items():
        sums[outcome] += count
    checks = {
        "wrong answers": sums["WRONG"],
        "bad requests that were not refused": sums["TAKEN"],
        "requests answered twice": sum(count > 1 for count in tally.replies.values()),
        "raw requests without a reply (but for those sent while there was no server)": sum(
            not first <= sent <= last + _RECONNECT_S for sent in tally.unanswered
        ),
        "threads that hang": hanging,
        f"requests that took longer than {_TIMEOUT_S + _GRACE_S:g} s": tally.overdue,
    }
    print(f"\nslowest request: {tally.slowest:.1f} s")
    for what, count in checks.items():
        print(f"{what}: {count}")
    return not any(checks.values())
