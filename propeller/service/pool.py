"""The hosts and workers that run one bundle, as the server sees them.

    start -> "host" -> "ready" of each worker -> batches -> ... -> stop -> all gone

A host is a process that forks workers and watches them: the server's own ones are started, and started again
when they die, here; others join from elsewhere. `host.py` is the other side.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import subprocess
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from propeller.service.backoff import Backoff
from propeller.service.serving import Answered, Serving, Work
from propeller.service.spawn import HostSettings, end_host, start_host
from propeller.service.wire import WireArray

log = logging.getLogger("propeller")

# A joined host says that it lives once a second.
_SILENT_S = 10.0
# The server's own host says so, too; on a machine that is too busy it may be late.
_HANGS_S = 60.0
# Between starts of a host that dies at once.
_RESTART_S = (0.2, 10.0)
# Starts in a row that brought no worker, before the bundle counts as one that cannot be run.
_MAX_STARTS = 3
_NAMES = 64

# Returns False if nobody is there.
Send = Callable[[Any, Mapping[str, Any], Sequence[WireArray]], bool]


@dataclasses.dataclass(eq=False)
class Worker:
    """A process that runs batches.

    Attributes:
        name: never used twice.
        address: where to send to.
        work: what it runs.
        since: when it got that, or became ready, in seconds on the clock.
    """

    name: str
    address: Hashable
    work: Work | None = None
    since: float = 0.0


@dataclasses.dataclass(eq=False)
class Host:
    """A process that has workers.

    Attributes:
        id: names the host.
        settings: how it was started; None for one that joined.
        process: the server's own child; None for one that joined, or that waits to be started again.
        address: where to send to, once it was heard of.
        workers: those that are ready, by name.
        seen: when it last said something.
        backoff: of starts that brought no worker.
        restart_at: when to start it again.
        leaving: gets no more batches.
        dead: names of workers that died last.
    """

    id: str
    settings: HostSettings | None
    process: subprocess.Popen[bytes] | None = None
    address: Hashable | None = None
    workers: dict[str, Worker] = dataclasses.field(default_factory=dict)
    seen: float = 0.0
    backoff: Backoff = dataclasses.field(default_factory=lambda: Backoff(*_RESTART_S))
    restart_at: float | None = None
    leaving: bool = False
    dead: deque[str] = dataclasses.field(default_factory=lambda: deque(maxlen=_NAMES))


class Pool:
    """Keeps the workers of a bundle running and busy.

    Args:
        serving: where batches come from and results go to.
        settings: the server's own hosts; each process gets a new id.
        send: sends a message to a host or worker.
        batch_timeout_s: a worker that takes longer over a batch hangs and is killed.
        on_restart: called for each worker that died.
        on_batch: called for each batch that was run, with its seconds.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        serving: Serving,
        settings: Sequence[HostSettings],
        send: Send,
        *,
        batch_timeout_s: float,
        on_restart: Callable[[], None] = lambda: None,
        on_batch: Callable[[Work, float], None] = lambda work, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.serving = serving
        self._settings, self._send = settings, send
        self._batch_timeout_s = batch_timeout_s
        self._on_restart, self._on_batch = on_restart, on_batch
        self._clock = clock
        self._hosts: dict[str, Host] = {}
        self._was_ready = self.is_stopping = False
        self._broken: str | None = None

    def start(self) -> None:
        """Starts the server's own hosts."""
        for settings in self._settings:
            self._start(settings, Backoff(*_RESTART_S))

    def _start(self, settings: HostSettings, backoff: Backoff) -> None:
        settings = dataclasses.replace(settings, host_id=secrets.token_hex(8))
        host = self._hosts[settings.host_id] = Host(settings.host_id, settings, backoff=backoff)
        try:
            host.process = start_host(settings)
        except OSError as error:  # no process or file is to be had now
            log.error("workers of the model %s cannot be started: %s", self.serving.name, error)
            host.restart_at = self._clock() + backoff.next()

    @property
    def is_ready(self) -> bool:
        """Whether every own host has all its workers, now or at some time before."""
        self._was_ready = self._was_ready or all(
            len(host.workers) >= host.settings.num_workers
            for host in self._hosts.values()
            if host.settings is not None
        )
        return self._was_ready

    @property
    def problem(self) -> str | None:
        """Why the bundle cannot be run, as a host says; None if nothing is known to be wrong."""
        return self._broken

    @property
    def is_lost(self) -> bool:
        """Whether there is no worker, and something is wrong that may last."""
        return self.problem is not None and not self.counts[0]

    @property
    def counts(self) -> tuple[int, int]:
        """Workers that get batches, and how many of them have nothing to do."""
        # Copies, since the thread of the metrics asks, too.
        hosts = [host for host in list(self._hosts.values()) if not host.leaving]
        workers = [worker for host in hosts for worker in list(host.workers.values())]
        return len(workers), sum(worker.work is None for worker in workers)

    def owns(self, host_id: str) -> bool:
        """Whether a host, or the host that a worker is named after, is one of these."""
        return host_id.partition(".")[0] in self._hosts

    def has_worker(self, address: Hashable) -> bool:
        """Whether one of the workers is at this address."""
        return any(worker.address == address for worker in self._workers())

    def join(self, host_id: str, address: Hashable) -> None:
        """Takes in a host that was started elsewhere and holds the same bundle."""
        self._hosts[host_id] = Host(host_id, None, address=address, seen=self._clock())
        log.info("a host joined for the model %s", self.serving.name)

    def on_message(
        self, address: Hashable, header: Mapping[str, Any], arrays: Sequence[WireArray], body: Any
    ) -> Answered:
        """Takes a message of one of its hosts or workers; returns the requests that are answered by it."""
        name, kind = header["id"], header["kind"]
        if kind in ("done", "failed"):
            return self._on_result(address, header, arrays, body)
        host = self._hosts[name.partition(".")[0]]
        host.seen = self._clock()
        if kind == "host":
            host.address = address
        elif kind == "beat" and (host.address != address or _number(header, "workers") > len(host.workers)):
            self._send(address, {"id": host.id, "kind": "who"}, ())  # it was overheard, or connected anew
        elif kind == "ready":
            return self._on_ready(host, name, address)
        elif kind == "died":
            log.warning("worker %s of the model %s died: %s", name, self.serving.name, header.get("status"))
            self._on_restart()
            host.dead.append(name)  # what it said before may be heard after this
            return self._lose(host.workers.pop(name, None))
        elif kind == "broken" and host.settings is None:
            log.warning("a host that joined cannot run %s: %s", self.serving.name, header.get("problem"))
            return self._drop(host)
        elif kind == "broken":
            self._broken = str(header.get("problem"))
        elif kind == "leave":
            host.leaving = True
        return []

    def _on_ready(self, host: Host, name: str, address: Hashable) -> Answered:
        known = host.workers.get(name)
        has_died = host.settings is not None and host.process is None
        if has_died or name in host.dead or (known is not None and known.address == address):
            return []
        host.backoff.reset()
        host.workers[name] = Worker(name, address, since=host.seen)
        self._broken = None
        return self._lose(known)  # it connected anew, so the batch that it had did not reach it

    def _on_result(
        self, address: Hashable, header: Mapping[str, Any], arrays: Sequence[WireArray], body: Any
    ) -> Answered:
        worker = next((worker for worker in self._workers() if worker.address == address), None)
        if worker is None or worker.work is None or header["id"] != str(worker.work.batch.number):
            return []  # of a worker that was given up
        work, worker.work, worker.since = worker.work, None, self._clock()
        if header["kind"] == "failed":
            return self.serving.failed(work.batch.number, str(header.get("problem")))
        self._on_batch(work, _number(header, "seconds"))
        outputs = {str(array.name): array.values for array in arrays}
        problem = _mismatch(work, self.serving, outputs, body)
        if problem:
            return self.serving.failed(work.batch.number, problem)
        return self.serving.done(work.batch.number, outputs, body or ())

    def _workers(self) -> list[Worker]:
        return [worker for host in self._hosts.values() for worker in host.workers.values()]

    def dispatch(self) -> None:
        """Gives batches to idle workers."""
        while idle := [
            (host, worker)
            for host in self._hosts.values()
            for worker in host.workers.values()
            if worker.work is None and not host.leaving
        ]:
            work = self.serving.next_batch(len(idle))
            if work is None:
                return
            host, worker = idle[-1]
            header = {
                "id": str(work.batch.number),
                "kind": "batch",
                "finish": work.finish,
                "outputs": work.outputs,
            }
            arrays = [WireArray(*item) for item in work.arrays.items()]
            worker.work, worker.since = work, self._clock()
            if not self._send(worker.address, header, arrays):
                self.serving.lost(work.batch.number, ran=False)
                worker.work = None
                self._give_up(host, worker)

    def tick(self) -> Answered:
        """Looks after hosts and workers; to be called a few times a second."""
        answered, now = [], self._clock()
        for host in list(self._hosts.values()):
            status = host.process.poll() if host.process is not None else None
            if status is not None:
                answered += self._host_died(host, status, now)
            elif host.settings is None and now - host.seen > _SILENT_S:
                log.warning("a host that had joined has not been heard of for %d s", _SILENT_S)
                answered += self._drop(host)
            elif host.process is not None and host.workers and now - host.seen > _HANGS_S:
                log.warning("the process that has the workers of %s hangs: killed", self.serving.name)
                end_host(host.process)
            elif host.settings is not None and host.restart_at is not None and now >= host.restart_at:
                answered += self._drop(host)
                self._start(host.settings, host.backoff)
            elif host.leaving and host.address is not None and not any(w.work for w in host.workers.values()):
                self._send(host.address, {"id": "stop", "kind": "stop"}, ())
                answered += self._drop(host)
            for worker in list(host.workers.values()):
                if worker.work is not None and now - worker.since > self._batch_timeout_s:
                    answered += self._give_up(host, worker)
        return answered

    def _give_up(self, host: Host, worker: Worker) -> Answered:
        """Has a worker killed that does not answer; whether it hears of it or not, it gets no batch again."""
        log.warning("worker %s does not answer: killed", worker.name)
        host.dead.append(worker.name)
        del host.workers[worker.name]
        if host.address is not None:
            self._send(host.address, {"id": worker.name, "kind": "kill"}, ())
        return self._lose(worker)

    def _host_died(self, host: Host, status: int, now: float) -> Answered:
        if host.process is not None:
            end_host(host.process)
        answered = self._lose(*host.workers.values())
        host.workers.clear()
        host.process, host.address = None, None
        if self.is_stopping:
            del self._hosts[host.id]
            return answered
        wait = host.backoff.next()
        host.restart_at = now + wait
        what = f"the process that has the workers of the model {self.serving.name} ended with status {status}"
        if host.backoff.count >= _MAX_STARTS and self._broken is None:
            self._broken = what
        log.warning("%s; it is started again in %.1f s", what, wait)
        return answered

    def _drop(self, host: Host) -> Answered:
        del self._hosts[host.id]
        return self._lose(*host.workers.values())

    def _lose(self, *workers: Worker | None) -> Answered:
        answered: Answered = []
        for worker in workers:
            if worker is not None and worker.work is not None:
                answered += self.serving.lost(worker.work.batch.number)
                worker.work = None
        return answered

    def stop(self) -> None:
        """Has all workers finish what they run and end."""
        self.is_stopping = True
        for host in list(self._hosts.values()):
            if host.address is not None:
                self._send(host.address, {"id": "stop", "kind": "stop"}, ())
            elif host.process is not None:
                end_host(host.process)
            else:
                del self._hosts[host.id]

    @property
    def is_gone(self) -> bool:
        """Whether none of the server's own processes is left."""
        return all(host.process is None or host.process.poll() is not None for host in self._hosts.values())

    def kill(self) -> None:
        """Ends the server's own processes at once, workers that hang too."""
        for host in self._hosts.values():
            if host.process is not None:
                end_host(host.process)


def _number(header: Mapping[str, Any], name: str) -> float:
    """A number out of a message, 0 if it is none."""
    value = header.get(name)
    return value if isinstance(value, int | float) else 0.0


def _mismatch(work: Work, serving: Serving, outputs: Mapping[str, Any], answers: Any) -> str | None:
    """What is wrong with the results of a batch; None if nothing is."""
    if len(answers or ()) != len(work.finish):
        return f"the worker gave {len(answers or ())} answers for {len(work.finish)} rows"
    if not work.outputs:
        return None
    for spec in serving.bundle.outputs:
        found = outputs.get(spec.name)
        if found is None or found.ndim != len(spec.axes) or len(found) != len(work.batch.rows):
            what = "nothing" if found is None else f"the shape {found.shape}"
            return f"output {spec.name!r} is {what} for {len(work.batch.rows)} rows"
    return None
