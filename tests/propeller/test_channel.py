"""What ranks tell one another, over real sockets: between threads, and between processes that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from multiprocessing import AuthenticationError

import pytest

from propeller import channel
from propeller.channel import Channel
from propeller.errors import RankError

KEY = b"the key of the run"
LIMIT_S = 30


class Star:
    """Rank 0 that listens in a thread, and what connects to it."""

    def __init__(self, size, pool):
        self.size, self._pool = size, pool
        port = queue.Queue()
        self._listening = pool.submit(Channel.listen, "127.0.0.1", size, KEY, port.put)
        self.port = port.get(timeout=LIMIT_S)

    def connect(self, rank, key=KEY):
        return Channel.connect("127.0.0.1", self.port, key, rank)

    def complete(self, order):
        """Lets the other ranks come in this order; returns all."""
        others = {rank: self.connect(rank) for rank in order}
        return [self._listening.result(LIMIT_S), *[others[rank] for rank in sorted(others)]]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture
def star(pool):
    """Makes a star of so many ranks, which are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(size, order=None):
            ranks = Star(size, pool).complete(order or range(1, size))
            for rank in ranks:
                stack.callback(rank.close)
            return ranks

        yield make


def at_once(pool, ranks, call):
    """Calls `call(rank)` for each, at the same time; gives the results, or the errors."""
    futures = [pool.submit(call, rank) for rank in ranks]
    return [future.exception(LIMIT_S) or future.result() for future in futures]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_get_what_all_gave(star, pool, size):
    """Of any size, also empty, in the order of the ranks whatever the order in which they came."""
    ranks = star(size, order=list(range(size - 1, 0, -1)))
    rounds = [[bytes([rank]) * (rank * place) for rank in range(size)] for place in (0, 1, 300, 70_000)]
    rounds.append([b"", b"\0", *[b"D", b"F"][: size - 2]])

    def all_rounds(rank):
        return [rank.exchange(payloads[rank.rank]) for payloads in rounds]

    assert at_once(pool, ranks, all_rounds) == [rounds] * size


def test_large_payloads_do_not_block_one_another(star, pool):
    payloads = [bytes([rank]) * (8 << 20) for rank in range(3)]
    found = at_once(pool, star(3), lambda rank: rank.exchange(payloads[rank.rank]) == payloads)
    assert found == [True] * 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_a_rank_says_before_it_goes_reaches_all(star, pool, failing):
    ranks = star(3)

    def wait(rank):
        if rank.rank != failing:
            return rank.exchange(b"x" * 100_000)
        rank.fail("Datei 'größe' ist leer")
        rank.close()

    found = at_once(pool, ranks, wait)
    assert found.pop(failing) is None
    for error in found:
        assert isinstance(error, RankError)
        assert str(error) == f"rank {failing} failed: Datei 'größe' ist leer"


def test_words_said_before_an_exchange_are_not_lost(star, pool):
    """Rank 0 has its answers under way to a rank that is gone: it still hears why."""
    ranks = star(3)
    ranks[1].fail("no room")
    ranks[1].close()
    found = at_once(pool, [ranks[0], ranks[2]], lambda rank: rank.exchange(b"x" * (1 << 20)))
    assert [str(error) for error in found] == ["rank 1 failed: no room"] * 2
    with pytest.raises(RankError, match="rank 0 ended without a word"):
        ranks[0].close()
        ranks[2].exchange(b"again")


class TestExplain:
    @pytest.mark.parametrize("failing", [0, 1])
    def test_by_what_another_rank_says(self, star, failing):
        ranks = star(3)
        ranks[failing].fail("no room")
        reason = ranks[1 - failing].explain(OSError("gloo: connection closed by peer"))
        assert str(reason) == f"rank {failing} failed: no room"

    def test_by_a_rank_that_is_gone(self, star):
        ranks = star(2)
        ranks[1].close()
        reason = ranks[0].explain(OSError("gloo: connection closed by peer"))
        assert str(reason).startswith("rank 1 ended without a word, as if it was killed.")

    def test_else_by_the_error_itself(self, star, monkeypatch):
        monkeypatch.setattr(channel, "_EXPLANATION_S", 0.0)
        reason = star(2)[1].explain(OSError("gloo: timed out"))
        assert isinstance(reason, RankError) and str(reason) == "rank 1 lost the others: gloo: timed out"


class TestStrangers:
    def test_a_wrong_key_is_refused(self, pool, caplog):
        ranks = Star(2, pool)
        with pytest.raises(AuthenticationError):
            ranks.connect(1, key=b"a guess")
        ranks = ranks.complete([1])
        assert at_once(pool, ranks, lambda rank: rank.exchange(b"ok")) == [[b"ok"] * 2] * 2
        assert "turned away 127.0.0.1, which is no rank of this run" in caplog.text

    @pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x04abcd", b"\xff" * 64])
    @pytest.mark.parametrize("stays", [False, True])
    def test_one_without_manners_holds_nobody_up(self, pool, monkeypatch, said, stays):
        """One that connects and says nothing, or nonsense, and one that stays on the line after that."""
        monkeypatch.setattr(channel, "_HANDSHAKE_S", 1)
        ranks = Star(3, pool)
        with socket.create_connection(("127.0.0.1", ranks.port)) as stranger:
            stranger.sendall(said)
            if not stays:
                stranger.close()
            ranks = ranks.complete([2, 1])
        assert at_once(pool, ranks, lambda rank: rank.exchange(b"ok")) == [[b"ok"] * 3] * 3

    def test_the_time_limit_is_for_strangers_alone(self, star, pool, monkeypatch):
        """A rank may wait for another as long as that takes."""
        monkeypatch.setattr(channel, "_HANDSHAKE_S", 1)
        ranks = star(2)
        waiting = pool.submit(ranks[0].exchange, b"first")
        with pytest.raises(FutureTimeout):  # before 3.11 not the builtin one
            waiting.result(timeout=1.5)
        assert ranks[1].exchange(b"late") == waiting.result(LIMIT_S) == [b"first", b"late"]

    def test_ranks_that_never_come(self, monkeypatch):
        monkeypatch.setattr(channel, "_JOIN_S", 0.1)
        with pytest.raises(OSError, match="timed out"):
            Channel.listen("127.0.0.1", 2, KEY, lambda port: None)


# One rank: rank 0 prints its port, the others are told it. One waits for its end, the others wait for it.
RANK = """
import signal, sys
from propeller.channel import Channel
from propeller.errors import RankError
rank, victim, key = int(sys.argv[1]), int(sys.argv[2]), b"key"
if rank:
    channel = Channel.connect("127.0.0.1", int(sys.stdin.readline()), key, rank)
else:
    channel = Channel.listen("127.0.0.1", 3, key, lambda port: print(port, flush=True))
channel.exchange(b"ready")
print("ready", flush=True)
if rank == victim:
    signal.pause()
try:
    channel.exchange(b"more")
except RankError as error:
    print(error)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_wait_of_all(root, victim):
    def start(rank):
        return subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(victim)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(start(rank)) for rank in range(3)]
        stack.callback(lambda: [rank.kill() for rank in ranks])
        port = json.loads(ranks[0].stdout.readline())
        for rank in ranks[1:]:
            rank.stdin.write(f"{port}\n")
            rank.stdin.flush()
        for rank in ranks:
            assert rank.stdout.readline() == "ready\n"
        ranks[victim].send_signal(signal.SIGKILL)
        for rank in ranks:
            said = rank.communicate(timeout=LIMIT_S)[0]
            assert rank is ranks[victim] or said.startswith(f"rank {victim} ended without a word")


def test_a_killed_rank_is_noticed_in_the_middle_of_a_payload(star, pool):
    """The frame is cut: its length has come, the rest never does."""
    ranks = star(2)
    raw = socket.socket(fileno=os.dup(ranks[1]._connections[0].fileno()))
    with raw:
        raw.sendall((1 << 20).to_bytes(4, "big") + b"D" + b"x" * 1000)
        waiting = pool.submit(ranks[0].exchange, b"")
        raw.shutdown(socket.SHUT_RDWR)
    error = waiting.exception(LIMIT_S)
    assert isinstance(error, RankError) and "rank 1 ended without a word" in str(error)


def test_closing_is_final(star):
    ranks = star(2)
    ranks[0].close()
    with pytest.raises(RankError, match="rank 0 ended without a word"):
        ranks[1].exchange(b"")
