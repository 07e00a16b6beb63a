"""A host: the process that loads a model once, forks workers which share its memory, and watches them.

    make -> load -> fork -> watch; a worker that died is replaced

A forked worker costs milliseconds and little memory of its own. What a GPU holds does not survive a fork:
there each worker loads the model for itself.

Nothing is ever orphaned, whoever is killed. A worker has a pipe to its host: it ends when the host dies. A
host has a pipe to whoever started it as its standard input: it ends, with all workers, when that one does.
A byte on it asks the host to leave a server that it joined. Such a host outlives that server, and works for
the next one.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

from propeller.service.backoff import Backoff
from propeller.service.child import SIGNALS, Child, describe, one_line
from propeller.service.spawn import HostSettings
from propeller.service.uplink import Uplink
from propeller.version import __version__

log = logging.getLogger("propeller")

# What a host tells a worker over their pipe, and what it hears from it.
STOP, ANNOUNCE = b"S", b"A"
_READY, _BROKEN = b"R", b"B"

_BEAT_S = 1.0
# A worker that died sooner than this after it was ready is replaced after a pause, each time a longer one.
_SHORT_LIFE_S, _REPLACE_S = 1.0, (0.1, 10.0)
# How long a joined host that was told to end waits for the server to let it go.
_LEAVE_S = 30.0
# How long a host that cannot run its bundle tries to tell the server.
_REPORT_S = 5.0
# When it says that there is no connection, which takes as long as the server is away.
_COMPLAIN_S = 5.0
_STDIN = 0


class Runner(Protocol):
    """What the workers of a host run."""

    def load(self) -> Iterator[None]:
        """Gets ready to predict, in steps: whoever iterates does other things in between."""

    def work(self, name: str, pipe: socket.socket) -> None:
        """Serves as a worker until told to stop.

        Args:
            name: of the worker.
            pipe: gives `STOP` and `ANNOUNCE`; it is at its end when the host is dead.
        """


class _Broken(Exception):
    """The bundle cannot be run on this machine."""


@dataclasses.dataclass(eq=False)
class _Worker:
    """Attributes: when it had its model ready, None before; why it could not load it."""

    child: Child
    ready_at: float | None = None
    problem: str | None = None


class Host:
    """Starts workers and keeps them running.

    Args:
        settings: what to run.
        make: reads what the workers run, before any is forked. Whatever it or `load` raises means that the
            bundle cannot be run here.
    """

    def __init__(self, settings: HostSettings, make: Callable[[HostSettings], Runner]):
        self._settings, self._make = settings, make
        self._runner: Runner
        self._workers: dict[str, _Worker] = {}
        self._started = 0
        self._due: list[float] = []  # when workers are to be forked
        self._backoff = Backoff(*_REPLACE_S)
        self._beat_at = time.monotonic() + _BEAT_S
        self._complain_at = time.monotonic() + _COMPLAIN_S
        self._leave_by = math.inf
        self._stopping = self._was_ready = False

    def run(self) -> int:
        """Runs until the server says stop.

        Returns:
            The exit code: 0, or 1 if the bundle cannot be run.
        """
        for number in SIGNALS:  # they come to all processes of a service; who started this one decides
            signal.signal(number, signal.SIG_IGN)
        self._uplink = Uplink(self._settings.endpoint, self._settings.curve_keys)
        self._uplink.watch(_STDIN)
        try:
            self._announce()
            self._step(_BEAT_S)  # so that the server knows before the long import; it may also be away
            if not self._ending:
                self._load()
            while self._workers or not self._stopping:
                self._step()
            return 0
        except _Broken as problem:
            self._report(str(problem))
            return 1
        finally:
            self._kill_all()
            self._uplink.close()

    def _announce(self) -> None:
        settings = self._settings
        about = {"model": settings.model, "bundle": settings.bundle_hash, "version": __version__}
        self._uplink.announce("host", settings.host_id, {**about, "num_workers": settings.num_workers})

    def _load(self) -> None:
        """Loads what the workers run and has them forked.

        Raises:
            _Broken: that failed.
        """
        try:
            self._runner = self._make(self._settings)
            for _ in () if self._settings.forks_first else self._runner.load():
                self._step(0.0)
                if self._ending:
                    break
        except Exception as error:  # whatever it is, the server must know that there will be no workers
            raise _Broken(one_line(error)) from error
        # What lives now is shared by all workers. A collector that looked at it would give each its own copy.
        gc.collect()
        gc.freeze()
        if not self._ending:
            self._due = [time.monotonic()] * self._settings.num_workers

    def _step(self, longest_s: float = math.inf) -> None:
        """Waits for something to do, at most so long, and does all there is.

        Raises:
            _Broken: no worker can load the model.
        """
        wake_at = min(self._beat_at, self._leave_by, *self._due)
        readable = self._uplink.wait(max(0.0, min(longest_s, wake_at - time.monotonic())))
        if _STDIN in readable:
            self._tugged()
        while (message := self._uplink.receive()) is not None:
            if message.header.get("reason"):
                log.warning("the server refuses this host: %s", message.header["reason"])
            self._obey(message.header.get("kind"), message.id)
        for worker in list(self._workers.values()):
            if worker.child.fileno() in readable:
                self._listen(worker)
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = math.inf
            if not self._uplink.is_announced:
                log.warning(
                    "no connection to %s yet: nobody listens there, or it refuses the keys",
                    self._settings.endpoint,
                )
        if now >= self._beat_at:
            ready = sum(worker.ready_at is not None for worker in self._workers.values())
            self._uplink.send("beat", self._settings.host_id, {"workers": ready})
            self._beat_at = now + _BEAT_S
        if now >= self._leave_by:
            self._abandon("the server did not let go of it")
        while self._due and self._due[0] <= now:
            del self._due[0]
            self._fork()

    def _tugged(self) -> None:
        """Who started the host is gone, or wants it to leave."""
        if not os.read(_STDIN, 1):
            self._abandon("the process that started it is gone")
        elif self._leaving or not self._uplink.send("leave", self._settings.host_id, {}):
            self._abandon("told to end")
        else:
            self._leave_by = time.monotonic() + _LEAVE_S
            self._due.clear()

    @property
    def _leaving(self) -> bool:
        return self._leave_by < math.inf

    @property
    def _ending(self) -> bool:
        return self._stopping or self._leaving

    def _abandon(self, reason: str) -> NoReturn:
        """Ends everything at once."""
        log.warning("host %s: %s", self._settings.host_id, reason)
        self._kill_all()
        os._exit(1)

    def _obey(self, kind: Any, target: str) -> None:
        """Does what the server says."""
        if kind == "stop" or (kind == "who" and self._leaving):
            self._stopping = True
            self._due.clear()
            self._tell_all(STOP)
        elif kind == "who":  # the server was away, had given this host up, or misses a worker
            self._announce()
            self._tell_all(ANNOUNCE)
        elif kind == "kill":
            if target in self._workers:  # else it just died
                self._workers[target].child.kill()
        else:
            log.error("host %s was told %r, which it does not know", self._settings.host_id, kind)

    def _tell_all(self, what: bytes) -> None:
        for worker in self._workers.values():
            worker.child.tell(what)

    def _fork(self) -> None:
        name = f"{self._settings.host_id}.{self._started}"
        self._started += 1
        siblings = [worker.child for worker in self._workers.values()]
        child = Child(name, lambda pipe: self._be_worker(name, pipe), siblings)
        self._workers[name] = _Worker(child)
        self._uplink.watch(child.fileno())
        log.info("worker %s of the model %s is process %d", name, self._settings.model, child.pid)

    def _be_worker(self, name: str, pipe: socket.socket) -> None:
        """Runs in the child."""
        try:
            for _ in self._runner.load() if self._settings.forks_first else ():
                pass
        except Exception as error:
            pipe.sendall(_BROKEN + one_line(error).encode("utf-8", "replace"))
            raise
        pipe.sendall(_READY)
        self._runner.work(name, pipe)

    def _listen(self, worker: _Worker) -> None:
        """Hears what a worker says.

        Raises:
            _Broken: it could not load its model, and none ever could.
        """
        said = worker.child.hear()
        if said == _READY:
            worker.ready_at = time.monotonic()
            self._was_ready = True
        elif said:
            worker.problem = said.removeprefix(_BROKEN).decode("utf-8", "replace")
        else:
            self._bury(worker)
            if worker.problem is not None and not self._was_ready:
                raise _Broken(worker.problem)

    def _bury(self, worker: _Worker) -> None:
        """Takes note of a worker's end, and has it replaced unless it was told to stop."""
        self._uplink.unwatch(worker.child.fileno())
        del self._workers[worker.child.name]
        code = worker.child.bury()
        if not code:
            return
        log.warning("worker %s is dead: %s", worker.child.name, describe(code))
        self._uplink.send("died", worker.child.name, {"status": describe(code)})
        if self._ending:
            return
        due = time.monotonic()
        if worker.ready_at is not None and due - worker.ready_at >= _SHORT_LIFE_S:
            self._backoff.reset()
        else:
            due += self._backoff.next()
        self._due = sorted([*self._due, due])

    def _report(self, problem: str) -> None:
        """Tells the server that nothing can be run here, as soon as it can be reached."""
        log.error("host %s cannot run %s: %s", self._settings.host_id, self._settings.folder, problem)
        self._kill_all()
        self._due.clear()
        give_up_at = time.monotonic() + _REPORT_S
        while not self._uplink.is_announced and (left := give_up_at - time.monotonic()) > 0:
            self._step(left)
        self._uplink.send("broken", self._settings.host_id, {"problem": problem})

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.child.kill()
        while self._workers:
            child = self._workers.popitem()[1].child
            self._uplink.unwatch(child.fileno())
            child.bury()
