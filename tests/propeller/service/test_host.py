"""Hosts: they fork workers, replace those that die, and leave nobody behind. All of it real processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys

import pytest

from propeller.errors import ConfigError, ExportError
from propeller.service.auth import make_keys
from propeller.service.spawn import HostSettings
from propeller.service.uplink import Uplink
from propeller.service.worker import Model

HOST = "00000000000000aa"
PATIENCE_S = 30


@pytest.fixture(scope="module")
def running(serve, host, linear_bundle):
    """A server with a host of two workers, which tests use one after the other."""
    server = serve()
    process = host(server, linear_bundle, num_workers=2, verbose=True)
    hello = server.next("host")
    return server, process, hello, {worker.id: worker for worker in server.workers(2)}


class TestDeaths:
    def test_a_killed_worker_is_replaced(self, running, numbers):
        server, _, hello, workers = running
        by_signal, by_message = list(workers.values())
        os.kill(by_signal.header["pid"], signal.SIGKILL)
        assert_replaced(server, workers, by_signal, numbers)
        server.send(hello, "kill", by_message.id)
        assert_replaced(server, workers, by_message, numbers)
        server.send(hello, "kill", by_message.id)  # who is gone already is no reason for anything
        server.check(workers.values(), numbers)

    def test_signals_are_the_servers_business(self, running, numbers):
        server, process, _, workers = running
        for worker in workers.values():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(worker.header["pid"], number)
                process.send_signal(number)
        server.check(workers.values(), numbers)
        assert process.poll() is None

    def test_who_is_there(self, running, numbers):
        server, _, hello, workers = running
        server.send(hello, "who", hello.id)
        again = {one.id: one for one in (server.next("host", "ready") for _ in range(3))}
        assert again.keys() == {HOST, *workers}
        assert all(again[name].address == worker.address for name, worker in workers.items())
        server.check(workers.values(), numbers)

    def test_stop(self, running, gone):
        """The last one of these."""
        server, process, hello, workers = running
        server.send(hello, "stop", "stop")
        assert process.wait(PATIENCE_S) == 0
        gone(*(worker.header["pid"] for worker in workers.values()))


def assert_replaced(server, workers, dead, numbers):
    names = {*workers}
    died = server.next("died")
    assert died.id == dead.id and died.header["status"] == "killed by signal 9 (SIGKILL)"
    del workers[dead.id]
    new = server.next("ready")
    assert new.id not in names and new.header["pid"] != dead.header["pid"]
    workers[new.id] = new
    server.check(workers.values(), numbers)


@pytest.fixture
def two(serve, host, linear_bundle):
    """A server, a host of two workers, and the pids of these."""
    server = serve()
    process = host(server, linear_bundle, num_workers=2)
    server.next("host")
    return server, process, [worker.header["pid"] for worker in server.workers(2)]


def test_the_server_vanishes(two, gone):
    _, process, pids = two
    process.stdin.close()
    assert process.wait(PATIENCE_S) == 1
    gone(*pids)


def test_the_host_is_killed(two, gone):
    _, process, pids = two
    process.kill()
    gone(*pids)


def test_a_worker_that_was_told_to_stop_is_not_replaced(serve, host, linear_bundle, numbers, gone):
    server = serve()
    process = host(server, linear_bundle, num_workers=2)
    hello = server.next("host")
    first, second = server.workers(2)
    server.send(first, "stop", "stop")
    gone(first.header["pid"])
    server.check([second], numbers)
    server.send(hello, "stop", "stop")
    assert process.wait(PATIENCE_S) == 0


# A host whose workers run no model. What they load fails while a file is there.
SCRIPT = """
import os, sys
from pathlib import Path
from propeller.service.host import Host
from propeller.service.spawn import HostSettings
from propeller.service.uplink import Uplink

class Runner:
    def __init__(self, settings):
        self.settings = settings

    def load(self):
        while Path(sys.argv[2]).exists():
            if self.settings.forks_first:
                raise RuntimeError("out of memory")
            yield
        yield

    def work(self, name, pipe):
        uplink = Uplink(self.settings.endpoint, None)
        uplink.announce("ready", name, {"host": self.settings.host_id, "pid": os.getpid()})
        uplink.watch(pipe.fileno())
        while pipe.fileno() not in uplink.wait():
            pass
        uplink.close()

sys.exit(Host(HostSettings.from_json(sys.argv[1]), Runner).run())
"""


@pytest.fixture
def host_of_nothing(host, linear_bundle, tmp_path):
    """`host_of_nothing(server, **settings)` starts that host; `flag` is the file."""

    def start(server, **more):
        return host(server, linear_bundle, script=(SCRIPT, tmp_path / "flag"), **more)

    start.flag = tmp_path / "flag"
    return start


class TestLoading:
    def test_in_each_worker(self, serve, host_of_nothing):
        """As on a GPU: one that cannot load any more is tried again, since others could."""
        server = serve()
        process = host_of_nothing(server, device="gpu:0")
        hello = server.next("host")
        (worker,) = server.workers(1)
        host_of_nothing.flag.touch()
        server.send(hello, "kill", worker.id)
        assert server.next("died").header["status"] == "killed by signal 9 (SIGKILL)"
        assert server.next("died").header["status"] == "exit status 1"
        host_of_nothing.flag.unlink()
        while server.next("died", "ready").header["kind"] == "died":
            pass
        server.send(hello, "stop", "stop")
        assert process.wait(PATIENCE_S) == 0

    @pytest.mark.parametrize("device", ["cpu", "gpu:0"])
    def test_is_stopped(self, serve, host_of_nothing, device):
        if device == "cpu":
            host_of_nothing.flag.touch()  # it loads without end
        server = serve()
        process = host_of_nothing(server, device=device)
        server.send(server.next("host"), "stop", "stop")
        assert process.wait(PATIENCE_S) == 0, "with or without a worker"

    def test_ends_with_the_server(self, serve, host_of_nothing):
        host_of_nothing.flag.touch()
        server = serve()
        process = host_of_nothing(server)
        server.next("host")
        assert server.next("beat").header["workers"] == 0, "it says that it lives"
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 1


class TestBrokenBundles:
    def test_another_bundle(self, serve, host, linear_bundle):
        server = serve()
        process = host(server, linear_bundle, bundle_hash="0" * 64)
        assert server.next("host").header["bundle"] == "0" * 64
        assert "but the server serves 000000000000" in server.next("broken").header["problem"]
        assert process.wait(PATIENCE_S) == 1

    def test_a_worker_that_loads_for_itself(self, serve, host, linear_bundle):
        server = serve()
        process = host(server, linear_bundle, device="gpu:0", bf16=True, num_workers=2)
        server.next("host")
        while (message := server.next("died", "broken")).header["kind"] == "died":
            assert message.header["status"] == "exit status 1"
        assert message.header["problem"] == "bf16 is for the CPU predictor; got a GPU."
        assert process.wait(PATIENCE_S) == 1

    def test_no_bundle(self, tmp_path):
        with pytest.raises(ExportError, match="is no bundle"):
            Model(HostSettings("ipc://x", HOST, "m", str(tmp_path), "0"))


class TestJoined:
    """A host that joined a server of another machine."""

    def test_it_leaves_and_outlives_a_server(self, serve, host, linear_bundle, numbers, tmp_path, gone):
        make_keys(tmp_path / "keys")
        server = serve("tcp://127.0.0.1:*", tmp_path / "keys")
        process = host(server, linear_bundle, curve_keys=str(tmp_path / "keys"))
        server.next("host")
        server.workers(1)
        server.close()
        server = serve(server.endpoint, tmp_path / "keys")
        beat = server.next("beat")
        assert beat.id == HOST and beat.header["workers"] == 1
        server.send(beat, "who", HOST)
        found = {one.header["kind"]: one for one in (server.next("host", "ready") for _ in range(2))}
        worker = found["ready"]
        server.check([worker], numbers)
        os.kill(worker.header["pid"], signal.SIGTERM)
        process.stdin.write(b"x")
        process.stdin.flush()
        assert server.next("leave").id == HOST
        server.check([worker], numbers)
        server.send(found["host"], "stop", "stop")
        assert process.wait(PATIENCE_S) == 0
        gone(worker.header["pid"])

    def test_told_a_second_time_it_ends_at_once(self, serve, host, linear_bundle, gone):
        server = serve()
        process = host(server, linear_bundle)
        server.next("host")
        (worker,) = server.workers(1)
        process.stdin.write(b"x")
        process.stdin.flush()
        server.next("leave")
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.wait(PATIENCE_S) == 1
        gone(worker.header["pid"])


class TestSettings:
    settings = HostSettings(
        "tcp://h:1", HOST, "m", "/b", "0", 3, 2, warmup_shapes=((1, 16), (8, 32)), curve_keys="/k"
    )

    def test_round_trip(self):
        assert HostSettings.from_json(self.settings.to_json()) == self.settings
        assert not self.settings.forks_first
        assert dataclasses.replace(self.settings, device="gpu:1").forks_first
        assert self.settings.environment()["OMP_NUM_THREADS"] == "2"

    def test_threads_after_a_fork(self, monkeypatch):
        """Whatever libraries of the process that starts a host have put into the environment."""
        monkeypatch.setenv("KMP_INIT_AT_FORK", "FALSE")
        assert self.settings.environment()["KMP_INIT_AT_FORK"] == "TRUE"

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "cannot be read"),
            ("[1]", "cannot be read"),
            ('{"num_worker": 1}', r"no setting 'num_worker'\. Did you mean 'num_workers'"),
            ('{"model": "m"}', "cannot be read .*endpoint"),
            ('{"warmup_shapes": [1]}', "cannot be read"),
        ],
    )
    def test_other_text(self, text, problem):
        with pytest.raises(ConfigError, match=problem):
            HostSettings.from_json(text)

    @pytest.mark.parametrize("name", ["num_workers", "num_threads"])
    def test_counts(self, name):
        with pytest.raises(ConfigError, match=f"{name} is 0; expected a whole number of at least 1"):
            dataclasses.replace(self.settings, **{name: 0})

    def test_the_command_wants_them(self, root):
        done = subprocess.run(
            [sys.executable, "-m", "propeller.service.worker"], capture_output=True, text=True, cwd=root
        )
        assert done.returncode == 2 and "error: Expected the settings of a host" in done.stderr


def test_what_is_sent_without_a_connection_is_dropped(serve, place):
    """But who it is, is said as soon as there is one."""
    uplink = Uplink(f"ipc://{place}/later", None)
    try:
        uplink.announce("host", HOST, {})
        assert not uplink.is_announced
        assert not uplink.send("beat", HOST, {})
        server = serve(f"ipc://{place}/later")
        while not uplink.is_announced:
            assert uplink.wait(PATIENCE_S) == set()
        assert server.next("host").id == HOST
        assert uplink.send("died", "w", {})
        server.next("died")
    finally:
        uplink.close()
