"""Examples with several rows on real servers: spread over batches, workers, hosts; joined in threads."""

from __future__ import annotations

import os
import re
import shutil
import signal

import numpy as np
import pytest

from propeller.errors import BadRequest, Draining, ServerError, WorkerDied
from propeller.service.auth import make_keys
from propeller.service.client import InferenceClient
from propeller.service.wire import Request, WireArray

PATIENCE_S = 30
QUICK = ("-p", 0, "--threads", 1, "--warmup-s", 0, "--metrics-port", 0)
LONG = list(range(1, 62))  # 20 windows


@pytest.fixture(scope="module")
def server(start_server, windows_bundle):
    """Two workers, two rows a batch."""
    words = ("-m", windows_bundle, *QUICK, "--workers", 2, "--max-batch-size", 2, "--max-queue", 90)
    return start_server(*words).wait_ready()


@pytest.fixture
def client(server):
    with InferenceClient(server.address, timeout=PATIENCE_S) as made:
        yield made


def example(id, *raws, **options):
    return Request(id, raws=list(raws), **options)


def check(reply, *raws):
    """A reply has the answers to these examples."""
    assert reply.error is None, reply.error
    for answer, raw in zip(reply.answers, raws, strict=True):
        assert answer["sum"] == sum(raw["ids"]) and answer["name"] == raw.get("name")
        starts = range(0, max(1, len(raw["ids"]) - 1), 3)
        assert answer["where"] == [f"from {at}" for at in starts]


class TestAnswers:
    def test_windows_spread_over_batches_and_workers(self, server, dealer):
        one, before = dealer(server.address), server.metric("batch_rows_count")
        raws = [{"ids": [7], "name": "short"}, {"ids": LONG, "name": "long"}, {"ids": [1, 2, 3, 4, 5]}]
        reply = one.ask(example("r1", *raws))
        check(reply, *raws)
        assert len(reply.answers[1]["pids"]) == 2
        assert server.metric("batch_rows_count") - before >= (1 + 20 + 2) / 2

    def test_many_requests_share_batches(self, server, dealer):
        one, sent = dealer(server.address), {}
        for number in range(30):
            raws = [{"ids": list(range(1, 2 + (number * 5 + place * 3) % 11)), "name": f"{number} {place}"}
                    for place in range(1 + number % 3)]  # fmt: skip
            sent[f"r{number}"] = raws
            one.send(example(f"r{number}", *raws))
            if number % 5 == 4:  # there is room for so many
                for _ in range(5):
                    reply = one.receive()
                    check(reply, *sent.pop(reply.id))
        assert not sent

    def test_arrays(self, client, server):
        found = client.outputs([{"ids": [1, 2]}, {"ids": [5]}])
        assert found["total"].tolist() == [3, 5] and found["at"].tolist() == [0, 0]
        with pytest.raises(BadRequest, match="2 examples make 3 rows.*Ask for answers"):
            client.outputs([{"ids": [1, 2]}, {"ids": [1, 2, 3, 4, 5]}])
        assert client.predict({"ids": [[1, 2], [3, 0]]})["total"].tolist() == [3, 3]

    def test_answers_to_arrays_are_not_joined(self, server, dealer):
        arrays = (WireArray("ids", np.array([[1, 2]])),)
        reply = dealer(server.address).ask(Request("r1", arrays=arrays, want="answers"))
        assert type(reply.error) is BadRequest and "send raws for them" in str(reply.error)

    def test_more_windows_than_the_queue_takes(self, client):
        with pytest.raises(BadRequest, match="1 examples make 100 rows.*expected at most 90"):
            client.answers([{"ids": [1] * 301}])


class TestFailures:
    @pytest.mark.parametrize(
        ("do", "words"),
        [
            ("fail", r"raws\[1\] of its 2 parts: KeyError\('there is no such thing'\)"),
            ("refuse", r"raws\[1\] of its 2 parts: it makes no sense"),
            ("quit", r"the processor gave up: SystemExit\(3\)"),
            ("strange", "JSON"),
        ],
    )
    def test_a_join_that_fails_harms_no_neighbour(self, server, dealer, do, words):
        one = dealer(server.address)
        good = {"ids": LONG, "name": "good"}
        one.send(example("good1", good))
        one.send(example("bad", good, {"ids": [1, 2, 3, 4, 5], "do": do}))
        one.send(example("good2", good))
        found = {reply.id: reply for reply in (one.receive() for _ in range(3))}
        bad = found.pop("bad").error
        assert type(bad) is ServerError
        assert re.search(words, str(bad))
        for reply in found.values():
            check(reply, good)

    def test_a_traceback_is_logged_once(self, server, dealer):
        one = dealer(server.address)
        for number in range(3):
            one.ask(example(f"join {number}", {"ids": [1, 2], "do": "fail"}))
            reply = one.ask(example(f"windows {number}", {"text": "neither ids nor text_a"}))
            assert type(reply.error) is BadRequest and "(KeyError: 'text_a')" in str(reply.error)
        log = server.log()
        for error in ("KeyError: 'there is no such thing'", "KeyError: 'text_a'"):
            assert log.count(f"\n{error}\n") == 1
        assert 'return {}["there is no such thing"]' in log

    def test_a_worker_that_is_killed_midway(self, server, dealer, toy_windows, wait_until):
        """Some windows are back, some run, some wait: none is lost, none is counted twice."""
        one, restarts = dealer(server.address), server.metric("worker_restarts_total")
        ids = [1] * 107  # 36 windows
        ids[30] = ids[45] = toy_windows.WAIT  # the 11th and the 16th, so that each worker has one in the end
        raw = {"ids": ids, "name": "held"}
        with server.gates["batch"]:
            one.send(example("r1", raw))
            wait_until(lambda: server.metric("queued_rows") == 36 - 16, "both workers that wait")
            assert server.metric("running_rows") == 4
            for pid in server.workers():
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: server.metric("worker_restarts_total") == restarts + 2, "two deaths")
        check(one.receive(), raw)

    def test_a_window_that_kills_its_worker(self, server, dealer, toy_windows):
        one = dealer(server.address)
        good = {"ids": LONG, "name": "good"}
        one.send(example("good", good))
        one.send(example("poison", good, {"ids": [*LONG[:30], toy_windows.DIE, *LONG]}))
        found = {reply.id: reply for reply in (one.receive() for _ in range(2))}
        assert type(found["poison"].error) is WorkerDied
        check(found["good"], good)


class TestSlowJoins:
    def test_others_are_answered_meanwhile(self, server, dealer):
        slow, quick = dealer(server.address), dealer(server.address)
        raw = {"ids": LONG, "name": "slow", "do": "wait"}
        with server.gates["join"]:
            slow.send(example("slow", raw))
            for number in range(20):
                check(quick.ask(example(f"r{number}", {"ids": LONG})), {"ids": LONG})
            assert quick.ask(Request("ping", "ping")).result["status"] == "ready"
        check(slow.receive(), raw)

    def test_a_client_that_leaves(self, server, dealer, wait_until):
        left, stays = dealer(server.address), dealer(server.address)
        with server.gates["join"]:
            left.send(example("left", {"ids": LONG, "do": "wait"}))
            check(stays.ask(example("r1", {"ids": LONG})), {"ids": LONG})
            left.close()
            check(stays.ask(example("r2", {"ids": LONG})), {"ids": LONG})
        check(stays.ask(example("r3", {"ids": LONG})), {"ids": LONG})


@pytest.mark.parametrize("patient", [True, False])
def test_a_server_that_drains_waits_for_a_join(
    start_server, windows_bundle, dealer, wait_until, gone, patient
):
    """Unless it is told a second time to end."""
    server = start_server("-m", windows_bundle, *QUICK, "--workers", 1, "--drain-s", 600).wait_ready()
    one, processes = dealer(server.address), [*server.hosts(), *server.workers()]
    raw = {"ids": LONG, "name": "last", "do": "wait"}
    with server.gates["join"]:
        one.send(example("last", raw))
        wait_until(lambda: server.metric("batch_rows_sum") == 20, "20 windows")
        server.process.terminate()
        while one.ask(Request("ping", "ping")).result["status"] != "draining":
            pass
        late = one.ask(example("late", raw))
        assert late.id == "late" and type(late.error) is Draining
        assert server.process.poll() is None
        if not patient:
            server.process.terminate()
            reply = one.receive()
            assert reply.id == "last" and type(reply.error) is Draining
    if patient:
        check(one.receive(), raw)
    assert server.process.wait(PATIENCE_S) == 0
    gone(*processes)
    assert not server.private() and "Traceback" not in server.log()


def test_windows_on_hosts_that_join(start_server, windows_bundle, wait_until, tmp_path):
    """A host that joined takes its share, and leaves."""
    keys, theirs = tmp_path / "keys", tmp_path / "theirs"
    make_keys(keys)
    theirs.mkdir()
    for name in ("server.key", "worker.key_secret"):
        shutil.copy(keys / name, theirs)
    words = ("-m", windows_bundle, *QUICK, "--max-batch-size", 2, "--curve-keys", keys, "--worker-port", 0)
    server = start_server(*words, "--workers", 1).wait_ready()
    where = server.logged(r"hosts can join at (\S+)")
    about = ("--curve-keys", theirs, "--workers", 1, "--threads", 1, "--warmup-s", 0)
    host = start_server("-m", windows_bundle, "--join", where, *about)
    wait_until(lambda: server.metric("workers") == 2, "a worker that joined")
    with InferenceClient(server.address, timeout=60, curve_keys=keys) as client:
        (answer,) = client.answers([{"ids": LONG}])
        assert answer["sum"] == sum(LONG) and set(answer["pids"]) == {*server.workers(), *host.workers()}
        assert host.stop() == 0
        wait_until(lambda: server.metric("workers") == 1, "a host that left")
        (answer,) = client.answers([{"ids": LONG}])
        assert answer["sum"] == sum(LONG) and answer["pids"] == server.workers()
