"""Ranks that really start and reach one another: by `--nproc`, and as the older launcher starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys
from propeller import cli, cores, launch
from propeller.config import ArgumentParser, parse_runconfig
def main():
    parser = ArgumentParser()
    parser.add_argument("--task", default="sum")
    args = parser.parse_args()
    launch.apply_disconfig()
    code = launch.relaunch(args.nproc, parse_runconfig(args))
    return globals()[args.task]() if code is None else code
def sum():
    rank, size = cores.rank_from_environment()
    from propeller.paddle.runtime import paddle
    paddle.distributed.init_parallel_env()
    total = paddle.to_tensor([rank + 1.0])
    paddle.distributed.all_reduce(total)
    sys.stderr.write(f"rank {rank} of {size}: {total.item()}, {os.environ['OMP_NUM_THREADS']} threads\\n")
def fail():
    rank, size = cores.rank_from_environment()
    if rank == 1:
        raise ValueError("rank 1 is unwell")
    signal.pause()
def wait():
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    sys.stderr.write("waiting\\n")
    signal.pause()
    sys.stderr.write("saved\\n")
    return 143
cli.run(main)
"""


@pytest.fixture
def start(tmp_path, root):
    """Starts the script."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def started(*flags, **environment):
        own = ("PADDLE_", "OMP_", "PROPELLER_", "FLAGS_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        return subprocess.Popen(
            [sys.executable, "script.py", "--run_config", '{"model_dir": "out"}', *flags], text=True,
            cwd=tmp_path, env={**clean, "PYTHONPATH": str(root), **environment}, stderr=subprocess.PIPE,
        )  # fmt: skip

    return started


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_two_ranks(start, tmp_path):
    process = start("--nproc", "2")
    _, err = process.communicate(timeout=120)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert process.returncode == 0, err
    assert f"rank 0 of 2: 3.0, {threads} threads\n" in err
    assert f"rank 1 of 2: 3.0, {threads} threads\n" in (tmp_path / "out/launch/workerlog.1").read_text(
        "utf-8"
    )
    assert sorted(os.listdir(tmp_path / "out/launch")) == [".lock", "workerlog.0", "workerlog.1"]


def test_a_rank_that_fails_ends_all(start):
    process = start("--nproc", "2", "--task", "fail")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert "[rank 1] ValueError: rank 1 is unwell\nerror: rank 1 ended with exit code 1, and so all" in err


def test_ctrl_c_waits_for_the_ranks(start):
    with start("--nproc", "2", "--task", "wait") as process:
        while "waiting" not in (line := process.stderr.readline()):
            assert line, "ended too early"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "saved\n" in err


def test_the_older_launcher(start):
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    cluster = {"chief": addresses[:1], "worker": addresses[1:]}
    processes = [
        start(PROPELLER_DISCONFIG=json.dumps({"cluster": cluster, "task": {"type": kind, "index": 0}}))
        for kind in ("chief", "worker")
    ]
    for rank, process in enumerate(processes):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f"rank {rank} of 2: 3.0, " in err
