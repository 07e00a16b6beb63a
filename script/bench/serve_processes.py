"""The processes that `serve.py` starts and watches: servers, offline peers, loads; Linux, by `/proc`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from serve_job import Load, Turn

HOST = "127.0.0.1"
START_S, STOP_S, TURN_S = 180.0, 60.0, 900.0
# What decides on threads and kernels is each contender's own choice, or named with it.
CLEANED = ("OMP_", "MKL_", "KMP_", "GLOG_", "FLAGS_", "PADDLE_", "PROPELLER_")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}


def clean_environment() -> dict[str, str]:
    """The environment that all contenders get."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(CLEANED)}
    return {**kept, **_OFFLINE}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def descendants(pid: int) -> dict[int, int]:
    """All processes below one, with their depth (1: a child); without those that have ended."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                # The name, in parentheses, may hold anything.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    found, depth, level = {}, 1, [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found.update(dict.fromkeys(level, depth))
        depth += 1
    return found


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a server's processes hold together.

    Attributes:
        rss_bytes: resident memory; what processes share counts for each.
        num_fds: open files and sockets.
        cpu_seconds: used since they began.
        num_processes: of the server.
    """

    rss_bytes: int
    num_fds: int
    cpu_seconds: float
    num_processes: int


def usage(pid: int) -> Usage:
    """Sums over a process and all below it; one that ends meanwhile is left out."""
    rss = fds = count = 0
    cpu = 0.0
    page, ticks = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
    for one in (pid, *descendants(pid)):
        folder = Path("/proc") / str(one)
        with contextlib.suppress(OSError):
            num_fds = len(os.listdir(folder / "fd"))
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            rss += int((folder / "statm").read_text().split()[1]) * page
            cpu += (int(fields[11]) + int(fields[12])) / ticks
            fds, count = fds + num_fds, count + 1
    return Usage(rss, fds, cpu, count)


class Process:
    """A child whose two outputs are kept: the last lines are part of every error.

    Args:
        name: for messages.
        command: what is run.
        answers: stdout is for the caller to read, line by line.
    """

    def __init__(self, name: str, command: Sequence[str], answers: bool = False):
        self.name, self._tail = name, deque[str](maxlen=20)
        self._ready = threading.Event()
        self._popen = subprocess.Popen(
            list(command),
            env=clean_environment(),
            stdin=subprocess.PIPE if answers else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if answers else subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.pid = self._popen.pid
        said = self._popen.stderr if answers else self._popen.stdout
        self._reader = threading.Thread(target=self._drain, args=(said,), daemon=True)
        self._reader.start()

    def _drain(self, lines: Any) -> None:
        for line in lines:
            self._tail.append(line.rstrip())
            if "READY" in line:
                self._ready.set()

    def wait_ready(self, is_ready: Callable[[], bool] | None = None) -> None:
        """Waits for a line with READY, or for `is_ready`.

        Raises:
            RuntimeError: the process ended, or took too long.
        """
        end = time.monotonic() + START_S
        while not (self._ready.wait(0.1) if is_ready is None else is_ready()):
            if self._popen.poll() is not None or time.monotonic() > end:
                self.kill()
                raise self.failure("did not get ready")
            if is_ready is not None:
                time.sleep(0.1)

    def ask(self, message: object | None) -> Any:
        """Sends a JSON line (unless None) and reads one.

        Raises:
            RuntimeError: the process has ended.
        """
        pipes = self._popen
        if pipes.stdin is None or pipes.stdout is None:
            raise TypeError(f"{self.name} was started without answers")
        try:
            if message is not None:
                pipes.stdin.write(json.dumps(message) + "\n")
                pipes.stdin.flush()
            return json.loads(pipes.stdout.readline())
        except (BrokenPipeError, ValueError):
            self.kill()
            raise self.failure("gave no answer") from None

    def failure(self, what: str) -> RuntimeError:
        """An error with the end of what the process said."""
        end = "\n".join(self._tail)
        return RuntimeError(f"{self.name} {what} (exit status {self._popen.poll()}):\n{end}")

    def terminate(self) -> None:
        """Asks the process to end and waits for it; kills it if it does not."""
        self._popen.terminate()
        try:
            self._popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._close()

    def kill(self) -> None:
        """Kills the process and all below it."""
        below = descendants(self.pid)
        self._popen.kill()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._popen.wait()
        self._close()

    def _close(self) -> None:
        """Closes the pipes, once the process has ended."""
        self._reader.join(timeout=1.0)
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was not sent
                    pipe.close()


@contextlib.contextmanager
def our_server(command: Sequence[str], model: Path, port: int, *flags: str) -> Iterator[Process]:
    """Starts the encoder server and waits for its READY."""
    process = Process("encoder_server", [*command, "-m", str(model), "-p", str(port), *flags])
    try:
        process.wait_ready()
        yield process
    finally:
        process.terminate()


@contextlib.contextmanager
def infinity(python: str, model: Path, port: int, dtype: str) -> Iterator[Process]:
    """Starts infinity as its manual has it for a CPU and waits until it is healthy."""
    flags = ["--model-id", str(model), "--served-model-name", "model", "--engine", "torch", "--device", "cpu"]
    address = ["--dtype", dtype, "--host", HOST, "--port", str(port), "--log-level", "warning"]
    process = Process("infinity", [python, "-m", "infinity_emb.cli", "v2", *flags, *address])

    def is_ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5.0):
                return True
        except (urllib.error.URLError, OSError):
            return False

    try:
        process.wait_ready(is_ready)
        yield process
    finally:
        process.terminate()


@contextlib.contextmanager
def offline(name: str, command: Sequence[str]) -> Iterator[Process]:
    """Starts an offline peer and waits until it has loaded; prints its versions."""
    process = Process(name, command, answers=True)
    try:
        print(f"{name}: {process.ask(None)['ready']}", flush=True)
        yield process
    finally:
        process.terminate()


def run_load(command: Sequence[str], load: Load, vectors: Path) -> Turn:
    """Runs clients in a process of their own.

    Args:
        command: a load's script.
        load: what it does.
        vectors: where the replies go, an npy file.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", vectors.with_suffix(".json")
        job.write_text(json.dumps(dataclasses.asdict(load)))
        try:
            done = subprocess.run(
                [*command, "--job", str(job), "--out", str(out)],
                env=clean_environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TURN_S,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{command[1]} did not end within {TURN_S:g} s") from error
        if done.returncode:
            end = "\n".join(done.stdout.splitlines()[-15:])
            raise RuntimeError(f"{command[1]} ended with {done.returncode}:\n{end}")
    return Turn(**json.loads(out.read_text()))
