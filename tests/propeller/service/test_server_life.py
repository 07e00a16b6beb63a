"""What becomes of requests while workers, hosts, versions and servers come and go. All real processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from propeller import manifest
from propeller.bundle import read_bundle
from propeller.errors import DeadlineExceeded, Draining, Overloaded, Unavailable, WorkerDied
from propeller.service.auth import make_client_keys, make_keys
from propeller.service.client import InferenceClient
from propeller.service.wire import Request

PATIENCE_S = 30
ROW = [3.0, 4.5]
MAX_QUEUE = 12
# Long warm-ups are tested elsewhere.
QUICK = ("-p", 0, "--threads", 1, "--warmup-s", 0, "--metrics-port", 0)


@pytest.fixture(scope="module")
def server(start_server, stage):
    """A server of two workers and a short queue, which tests of workers use one after the other."""
    words = ("-m", stage.bundles[0], *QUICK, "--workers", 2, "--max-queue", MAX_QUEUE)
    return start_server(*words).wait_ready()


@pytest.fixture
def client(server):
    with InferenceClient(server.address, timeout=PATIENCE_S) as made:
        yield made


def example(id, *rows, **options):
    return Request(id, raws=[{"x": list(row)} for row in rows or [ROW]], **options)


@pytest.fixture
def hold(stage, wait_until):
    """`hold(server, dealer, count)` has that many workers wait at the gate `batch`, each with a request."""

    def hold(server, one, count):
        server.gates["batch"].close()
        running = server.metric("running_rows")
        for number in range(count):
            one.send(example(f"held{number}", [stage.module.WAIT, 1]))
            expected = running + number + 1
            wait_until(lambda: server.metric("running_rows") == expected, "a batch that runs")  # noqa: B023

    return hold


def replies(one, count):
    """The next replies by id; each comes once."""
    found = {}
    for _ in range(count):
        reply = one.receive()
        assert reply.id not in found
        found[reply.id] = reply
    return found


def check(stage, reply, *rows):
    """A reply has the answers for these rows."""
    assert reply.error is None, reply.error
    np.testing.assert_allclose([answer["y"] for answer in reply.answers], stage.y(rows or [ROW]), rtol=1e-4)


class TestWorkers:
    def test_requests_of_killed_workers_are_tried_again(self, server, stage, dealer, hold, wait_until):
        one, before = dealer(server.address), server.metric("worker_restarts_total")
        hold(server, one, 2)
        workers = server.workers()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.metric("worker_restarts_total") == before + 2, "two deaths")
        server.gates["batch"].open()
        for reply in replies(one, 2).values():
            check(stage, reply, [stage.module.WAIT, 1])
        wait_until(lambda: server.metric("workers") == 2, "two new workers")
        assert not set(workers) & set(server.workers())

    def test_a_request_that_kills_its_worker_fails_alone(
        self, server, stage, dealer, hold, client, wait_until
    ):
        one, before = dealer(server.address), server.metric("worker_restarts_total")
        hold(server, one, 2)
        for number in range(4):  # together in a batch with the poison
            one.send(example(f"good{number}", [number, 1]))
        one.send(example("poison", [stage.module.DIE, 1]))
        wait_until(lambda: server.metric("queued_rows") == 5, "a queue")
        server.gates["batch"].open()
        found = replies(one, 7)
        assert type(found["poison"].error) is WorkerDied
        for number in range(4):
            check(stage, found[f"good{number}"], [number, 1])
        wait_until(lambda: server.metric("worker_restarts_total") == before + 2, "two deaths")
        np.testing.assert_allclose(client([ROW])[0], stage.y([ROW]), rtol=1e-5)
        wait_until(lambda: server.metric("workers") == 2, "two new workers")

    def test_a_killed_host_is_started_again(self, server, stage, dealer, hold, gone, wait_until):
        one = dealer(server.address)
        hold(server, one, 2)
        one.send(example("waits"))
        (host,), workers = server.hosts(), server.workers()
        os.kill(host, signal.SIGKILL)
        gone(*workers)
        server.gates["batch"].open()
        found = replies(one, 3)
        check(stage, found.pop("waits"))
        for reply in found.values():
            check(stage, reply, [stage.module.WAIT, 1])
        wait_until(lambda: server.metric("workers") == 2, "two new workers")
        assert server.hosts() != [host]

    def test_rows_of_a_client_that_left_are_not_run(self, server, stage, dealer, hold, wait_until):
        one, before = dealer(server.address), server.metric("batch_rows_sum")
        hold(server, one, 2)
        left, stays = dealer(server.address), dealer(server.address)
        for number in range(5):
            left.send(example(f"r{number}", ROW, ROW))
        stays.send(example("stays"))
        wait_until(lambda: server.metric("queued_rows") == 11, "a queue")
        left.close()
        wait_until(lambda: server.metric("queued_rows") == 1, "a shorter queue")
        server.gates["batch"].open()
        replies(one, 2)
        check(stage, stays.receive())
        assert server.metric("batch_rows_sum") == before + 3

    def test_a_deadline_in_the_queue(self, server, dealer, hold):
        one = dealer(server.address)
        hold(server, one, 2)
        before = server.metric("batch_rows_sum")
        one.send(example("late", deadline_ms=50))
        reply = one.receive()
        assert reply.id == "late" and type(reply.error) is DeadlineExceeded
        server.gates["batch"].open()
        assert replies(one, 2).keys() == {"held0", "held1"}
        assert server.metric("batch_rows_sum") == before + 2, "it was not run"

    def test_a_full_queue(self, server, stage, dealer, hold):
        one = dealer(server.address)
        hold(server, one, 2)
        one.send(example("fits", *[ROW] * MAX_QUEUE))
        one.send(example("over"))
        reply = one.receive()
        assert reply.id == "over" and type(reply.error) is Overloaded
        assert reply.error.retry_after_ms >= 1 and "the queue takes 12" in str(reply.error)
        one.send(example("never", *[ROW] * (MAX_QUEUE + 1)))
        assert "13 rows; at most 12" in str(one.receive().error)
        with InferenceClient(server.address, timeout=PATIENCE_S, retry=False) as hasty:
            with pytest.raises(Overloaded):
                hasty.answers([{"x": ROW}])
        refused = server.metric("requests_total", code="overloaded")
        with InferenceClient(server.address, timeout=PATIENCE_S) as patient, ThreadPoolExecutor(1) as pool:
            later = pool.submit(patient.answers, [{"x": ROW}])
            while server.metric("requests_total", code="overloaded") == refused:
                assert not later.done()
            server.gates["batch"].open()
            np.testing.assert_allclose(later.result()[0]["y"], stage.y([ROW])[0], rtol=1e-4)
        check(stage, replies(one, 3)["fits"], *[ROW] * MAX_QUEUE)


def test_a_worker_that_hangs_is_killed(start_server, stage, dealer, wait_until):
    words = ("-m", stage.bundles[0], *QUICK, "--workers", 1, "--batch-timeout-s", 1)
    server = start_server(*words).wait_ready()
    one = dealer(server.address)
    reply = one.ask(example("hangs", [stage.module.HANG, 0]))
    assert type(reply.error) is WorkerDied
    check(stage, one.ask(example("r1")))
    wait_until(lambda: server.metric("worker_restarts_total") == 2, "two deaths")
    assert "does not answer: killed" in server.log()


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def test_from_start_to_end(start_server, stage, dealer, hold, gone, wait_until):
    """States, requests that come early or late, and what is left behind."""
    port = free_port()
    words = ("-m", stage.bundles[0], *QUICK, "--workers", 1, "-p", port)
    server = start_server(*words, closed=["load"])
    one = dealer(f"tcp://127.0.0.1:{port}")
    assert one.ask(Request("r1", "ping")).result["status"] == "starting"
    assert server.http("/health") == (503, "starting\n")
    one.send(example("early"))
    assert one.ask(Request("r2", "spec")).result["bundle"] == read_bundle(stage.bundles[0]).hash
    server.gates["load"].open()
    check(stage, one.receive())
    server.wait_ready()
    assert one.ask(Request("r3", "ping")).result["status"] == "ready"
    (private,) = server.private()
    assert private.stat().st_mode & 0o777 == 0o700
    hold(server, one, 1)
    processes = [*server.hosts(), *server.workers()]
    assert len(processes) == 2
    one.send(example("waits"))
    wait_until(lambda: server.metric("queued_rows") == 1, "a queue")
    server.process.terminate()
    wait_until(lambda: server.http("/health") == (503, "draining\n"), "draining")
    assert one.ask(Request("r4", "ping")).result["status"] == "draining"
    late = one.ask(example("late"))
    assert late.id == "late" and type(late.error) is Draining
    assert server.process.poll() is None
    server.gates["batch"].open()
    found = replies(one, 2)
    check(stage, found["held0"], [stage.module.WAIT, 1])
    check(stage, found["waits"])
    assert server.process.wait(PATIENCE_S) == 0
    gone(*processes)
    assert not server.private() and "Traceback" not in server.log()


def test_two_servers(start_server, stage, dealer, hold, gone):
    """They do not know of each other; one is killed, the other one ended in a hurry."""
    words = ("-m", stage.bundles[0], *QUICK, "--workers", 1)
    servers = [start_server(*words, "--drain-s", 600) for _ in range(2)]
    killed, ended = (server.wait_ready() for server in servers)
    ones = [dealer(server.address) for server in servers]
    for one in ones:
        check(stage, one.ask(example("r1")))
    processes = [*killed.hosts(), *killed.workers()]
    killed.process.kill()
    gone(*processes)
    check(stage, ones[1].ask(example("r2")))
    hold(ended, ones[1], 1)
    processes = [*ended.hosts(), *ended.workers()]
    ended.process.terminate()
    while ones[1].ask(Request("r3", "ping")).result["status"] != "draining":
        pass
    ended.process.terminate()
    reply = ones[1].receive()
    assert reply.id == "held0" and type(reply.error) is Draining
    assert ended.process.wait(PATIENCE_S) == 0
    gone(*processes)
    assert not ended.private()


@pytest.fixture(scope="module")
def unrunnable(stage, tmp_path_factory):
    """A bundle that is whole, but for its model, which Paddle cannot read."""
    folder = tmp_path_factory.mktemp("unrunnable") / "bundle"
    shutil.copytree(stage.bundles[1], folder)
    (folder / "model.json").write_text("{}")
    about = json.loads((folder / "bundle.json").read_text())
    about["files"]["model.json"] = manifest.file_entry(folder / "model.json")
    (folder / "bundle.json").write_text(json.dumps(about))
    read_bundle(folder)
    return folder


class TestBadStarts:
    def ends(self, server, status, words):
        assert server.process.wait(PATIENCE_S) == status
        assert words in server.log() and "Traceback" not in server.log()
        assert server.process.stdout.read() == b"" and not server.private()

    def test_no_bundle(self, start_server, tmp_path):
        self.ends(start_server("-m", tmp_path, *QUICK), 1, f"error: {tmp_path} is no bundle")

    def test_a_bundle_that_cannot_be_run(self, start_server, unrunnable):
        server = start_server("-m", unrunnable, *QUICK)
        self.ends(server, 1, "error: The model default cannot be run: ")
        assert str(unrunnable) in server.log()

    def test_a_port_that_is_taken(self, start_server, stage):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            server = start_server("-m", stage.bundles[0], *QUICK, "-p", port)
            self.ends(server, 2, f"tcp://127.0.0.1:{port} cannot be listened on")

    def test_open_to_all_without_keys(self, start_server, stage):
        server = start_server("-m", stage.bundles[0], *QUICK, "--bind", "0.0.0.0")
        self.ends(server, 2, "bind is 0.0.0.0, which other machines can reach, and there are no keys")


class Load:
    """Clients that ask two models all the while, and compare."""

    def __init__(self, server, stage, models):
        self._stop, self.asked, self.versions = threading.Event(), 0, {name: set() for name in models}
        self._server, self._stage, self._models = server, stage, models

    def _ask(self, seed):
        rng = np.random.default_rng(seed)
        with contextlib.ExitStack() as stack:
            clients = {
                name: stack.enter_context(
                    InferenceClient(self._server.address, timeout=PATIENCE_S, model=name, retry=False)
                )
                for name in self._models
            }
            while not self._stop.is_set():
                name, x = (
                    rng.choice(self._models),
                    rng.normal(size=(rng.integers(1, 5), 2)).astype(np.float32),
                )
                y = (
                    clients[name](x)[0]
                    if seed % 2
                    else [a["y"] for a in clients[name].answers([{"x": r.tolist()} for r in x])]
                )
                right = [np.allclose(y, self._stage.y(x, version), atol=1e-4) for version in (0, 1)]
                assert sum(right) == 1, (y, x)
                self.versions[name].add(right.index(True))
                self.asked += 1

    def __enter__(self):
        self._pool = ThreadPoolExecutor(2)
        self._done = [self._pool.submit(self._ask, seed) for seed in range(2)]
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._pool.shutdown()
        for done in self._done:
            done.result()


def test_a_new_version_is_taken_over_without_a_lost_request(
    start_server, stage, unrunnable, tmp_path, wait_until, gone
):
    """One model by a link that is changed, one by SIGHUP; versions that are no good change nothing."""
    link, folder, empty = tmp_path / "link", tmp_path / "folder", tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(stage.bundles[0], folder)

    def lead_to(target):
        new = tmp_path / "new"
        new.symlink_to(target)
        new.replace(link)

    lead_to(stage.bundles[0])
    words = ("-m", f"linked={link}", "-m", f"folder={folder}", *QUICK, "--workers", 1)
    server = start_server(*words).wait_ready()
    old = [*server.hosts(), *server.workers()]

    def hashes():
        with InferenceClient(server.address, timeout=PATIENCE_S) as client:
            found = client.spec()["bundle"]
        with InferenceClient(server.address, timeout=PATIENCE_S, model="folder") as client:
            return [found, client.spec()["bundle"]]

    first, second = (read_bundle(bundle).hash for bundle in stage.bundles)
    with Load(server, stage, ("linked", "folder")) as load:
        lead_to(empty)
        server.logged(r"the new version of the model (linked) cannot be served: .* is no bundle")
        lead_to(unrunnable)
        server.logged(r"the new version of the model (linked) cannot be run: ")
        assert hashes() == [first, first]
        lead_to(stage.bundles[1])
        wait_until(lambda: hashes() == [second, first], "the new version by the link")
        folder.rename(tmp_path / "before")
        shutil.copytree(stage.bundles[1], folder)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: hashes() == [second, second], "the new version by SIGHUP")
        gone(*old)
        asked = load.asked
        wait_until(lambda: load.asked > asked + 40, "more answers")
    assert load.versions == {"linked": {0, 1}, "folder": {0, 1}}
    assert server.metric("requests_total") == server.metric("requests_total", code="ok")
    assert "the model linked is as it was" in server.log()
    wait_until(lambda: len(server.hosts()) == 2, "no more than two hosts")
    assert server.stop() == 0


def test_a_folder_that_vanishes_and_another_version_in_its_place(
    start_server, stage, tmp_path, wait_until, gone
):
    """Until then the server says that it is not ready, and when to ask again."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    shutil.copytree(stage.bundles[0], folder)
    shutil.copytree(stage.bundles[1], other)
    server = start_server("-m", folder, *QUICK, "--workers", 1).wait_ready()
    shutil.rmtree(folder)
    with InferenceClient(server.address, timeout=PATIENCE_S) as patient, ThreadPoolExecutor(1) as pool:
        np.testing.assert_allclose(patient([ROW])[0], stage.y([ROW]), rtol=1e-5)
        assert server.http("/health") == (200, "ready\n"), "what runs needs no folder"
        (host,), workers = server.hosts(), server.workers()
        os.kill(host, signal.SIGKILL)
        gone(*workers)
        wait_until(lambda: "is no bundle" in server.http("/health")[1], "a reason")
        status, text = server.http("/health")
        assert status == 503 and text.startswith("starting\nthe model default has no worker now (")
        answer = patient.ping()
        assert answer["status"] == "starting" and "is no bundle" in answer["reason"]
        with InferenceClient(server.address, timeout=PATIENCE_S, retry=False) as hasty:
            with pytest.raises(Overloaded, match="cannot be run now: .* is no bundle") as caught:
                hasty([ROW])
            assert caught.value.retry_after_ms > 0
        later = pool.submit(patient, [ROW])
        other.rename(folder)
        np.testing.assert_allclose(later.result()[0], stage.y([ROW], 1), rtol=1e-5)
    wait_until(lambda: server.http("/health") == (200, "ready\n"), "a ready server")
    assert server.stop() == 0


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys") / "server"
    make_keys(folder)
    return folder


@pytest.fixture(scope="module")
def locked(start_server, stage, keys):
    """A server of one worker that takes no one without a key, and lets hosts join."""
    words = ("-m", stage.bundles[0], *QUICK, "--workers", 1, "--curve-keys", keys, "--worker-port", 0)
    return start_server(*words).wait_ready()


def ask(server, **options):
    with InferenceClient(server.address, timeout=PATIENCE_S, **options) as client:
        return client([ROW])[0]


class TestKeys:
    def test_the_right_key(self, locked, stage, keys, tmp_path):
        for name in ("server.key", "client.key_secret"):  # what a client's machine has
            shutil.copy(keys / name, tmp_path)
        np.testing.assert_allclose(ask(locked, curve_keys=tmp_path), stage.y([ROW]), rtol=1e-5)

    def test_a_wrong_key_or_none(self, locked, keys, tmp_path):
        before = locked.metric("received_requests_total")
        make_keys(tmp_path / "others")
        for name in ("client.key_secret", "worker.key_secret"):  # a worker's key lets no client in
            stranger = tmp_path / name
            stranger.mkdir()
            shutil.copy(keys / "server.key", stranger)
            source = tmp_path / "others" if name == "client.key_secret" else keys
            shutil.copy(source / name, stranger / "client.key_secret")
            with pytest.raises(Unavailable, match="key"):
                ask(locked, curve_keys=stranger)
        with pytest.raises(Unavailable), InferenceClient(locked.address, timeout=0.5) as client:
            client([ROW])
        assert locked.metric("received_requests_total") == before

    def test_a_key_that_was_added(self, locked, stage, keys, tmp_path, wait_until):
        secret = make_client_keys(keys, "late")
        shutil.copy(keys / "server.key", tmp_path)
        shutil.copy(secret, tmp_path / "client.key_secret")
        locked.process.send_signal(signal.SIGHUP)

        def answered():
            with contextlib.suppress(Unavailable):
                return ask(locked, curve_keys=tmp_path)

        found = wait_until(lambda: answered() is not None, "an answer")
        assert found

    def test_hosts_that_join(self, locked, start_server, stage, keys, hold, wait_until, gone, tmp_path):
        """One serves and is lost with a request, one leaves when told to, one has another bundle."""
        where = locked.logged(r"hosts can join at (\S+)")
        for name in ("server.key", "worker.key_secret"):  # what the other machine has
            shutil.copy(keys / name, tmp_path)

        def join(version):
            words = (
                "--join",
                where,
                "--curve-keys",
                tmp_path,
                "--workers",
                1,
                "--threads",
                1,
                "--warmup-s",
                0,
            )
            return start_server("-m", stage.bundles[version], *words)

        lost = join(0)
        wait_until(lambda: locked.metric("workers") == 2, "a worker that joined")
        with (
            InferenceClient(locked.address, timeout=60, curve_keys=keys) as client,
            ThreadPoolExecutor(2) as pool,
        ):
            locked.gates["batch"].close()
            lost.gates["batch"].close()
            held = []
            for _ in range(2):
                held.append(pool.submit(client.answers, [{"x": [stage.module.WAIT, 1]}]))
                wait_until(lambda: locked.metric("running_rows") == len(held), "a batch that runs")
            processes = [*lost.hosts(), *lost.workers()]
            lost.process.kill()
            gone(*processes)
            other = join(1)
            locked.logged(r"a host that wants to join is refused: it has (model default), bundle .{12}")
            other.logged(r"the server refuses this host: it has (model default)")
            other.logged(r"the server let go of the workers of (default)")
            assert other.stop() == 0
            locked.gates["batch"].open()
            for each in held:
                np.testing.assert_allclose(
                    each.result()[0]["y"], stage.y([[stage.module.WAIT, 1]])[0], rtol=1e-4
                )
            assert "a host that had joined has not been heard of" in locked.log()
            leaves = join(0)
            wait_until(lambda: locked.metric("workers") == 2, "a worker that joined")
            found = [pool.submit(client, [[number, 1.0]]) for number in range(50)]
            assert leaves.stop() == 0
            for number, each in enumerate(found):
                np.testing.assert_allclose(each.result()[0], stage.y([[number, 1.0]]), rtol=1e-4)
        assert locked.metric("workers") == 1 and locked.metric("requests_total", code="worker_died") == 0

    def test_joining_needs_the_workers_key(self, start_server, stage, keys, tmp_path):
        shutil.copy(keys / "server.key", tmp_path)
        words = ("--join", "tcp://127.0.0.1:9", "--curve-keys", tmp_path, "--workers", 1)
        joins = start_server("-m", stage.bundles[0], *words)
        assert joins.process.wait(PATIENCE_S) != 0
        assert "worker.key_secret" in joins.log()
