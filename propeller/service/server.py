"""The server: one loop between clients and workers. No Paddle here.

    client -> frontend -> decode -> check, or prepare in a thread -> admit -> batch -> worker
           <- frontend <- encode <- reply <- join in a thread <- rows of the request <- outputs of a batch <-

Each admitted request is answered once: by its results, or by an error that says why there are none.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from propeller.cores import available_cores
from propeller.errors import (
    Draining,
    ExportError,
    PropellerError,
)
from propeller.service.companion import Companion
from propeller.service.frames import Limits, MessageReader
from propeller.service.intake import DRAINING, READY, STARTING, Intake
from propeller.service.metrics import Metrics, serve_http
from propeller.service.model import Model, make_pool
from propeller.service.pool import Pool
from propeller.service.settings import ServerSettings, worker_plan
from propeller.service.sockets import Address, Sockets
from propeller.version import __version__

log = logging.getLogger("propeller")

# How often hosts and companions are looked after while nothing else happens, and how often links are read.
_TICK_S, _LINK_S = 0.2, 1.0
# Text is prepared, and answers joined, by so many threads: tokenizers let others run meanwhile.
_PREPARE_THREADS = 2
# A processor in plain Python gives way to the loop after so long, not after 5 ms: the loop has a few such
# moments in each turn, and all other requests wait for it.
_SWITCH_S = 0.001
_STOP_S = 10.0
_HOST_ID = re.compile("[0-9a-f]{16}")
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Server:
    """Serves models until it is told to end.

    Args:
        settings: what and where.
        companion: a command to run beside it once it is ready, such as an HTTP front: `{address}` in it
            becomes a private address of this server, `{metrics}` the URL of its metrics.

    Raises:
        PropellerError: a bundle that cannot be served, an address that is taken, keys that are missing.
    """

    def __init__(self, settings: ServerSettings, companion: Sequence[str] = ()):
        self._settings = settings
        self._drain_until = float("inf")
        self._next_tick = self._next_link = 0.0
        self._signals: deque[int] = deque()
        limits = Limits(
            max_message_bytes=settings.max_message_bytes, max_rows=min(settings.max_queue_rows, 1 << 16)
        )
        self._metrics = Metrics()
        self._companion = Companion(companion)
        with contextlib.ExitStack() as stack:
            self._sockets = Sockets(settings, local_clients=self._companion.is_wanted)
            stack.callback(self._sockets.close)
            self._threads = ThreadPoolExecutor(_PREPARE_THREADS, "prepare")
            stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)
            self._models: dict[str, Model] = {}
            for name, path in settings.models.items():
                make = functools.partial(make_pool, settings, name, self._sockets, self._metrics)
                self._models[name] = Model(name, path, make, self._threads)
            self._intake = Intake(self._models, self._sockets, limits, self._threads, self._metrics)
            self._metrics_http = None
            port = settings.metrics_port
            if port is not None or self._companion.is_wanted:
                bind = settings.metrics_bind
                self._metrics_http = serve_http(self._metrics, lambda: self._intake.health, bind, port or 0)
                stack.callback(self._metrics_http.close)
                log.info("metrics and health on port %d", self._metrics_http.port)
            stack.callback(self._companion.close)
            stack.callback(self._kill_workers)
            self._stack = stack.pop_all()

    @property
    def address(self) -> str:
        """Where clients connect."""
        address: str = self._sockets.frontends[0].address
        return address

    def run(self) -> int:
        """Serves until SIGTERM or SIGINT; returns the exit status.

        Raises:
            ExportError: a bundle that cannot be run.
        """
        with self._stack, self._listening_to_signals():
            for name, model in self._models.items():
                self._metrics.watch(name, model.gauges)
                model.start()
            while not self._is_done():
                self._turn(self._sockets.wait(self._pause()))
            return self._end()

    def _turn(self, readable: Collection[Any]) -> None:
        """One round: what came in, what is due, what workers can take."""
        while self._signals:
            self._on_signal(self._signals.popleft())
        for address, message in self._sockets.from_workers(readable):
            self._on_worker(address, message)
        self._intake.go_on()
        for frontend in self._sockets.frontends:
            for client, frames in frontend.receive() if frontend.socket in readable else ():
                self._intake.take(client, frames)
            frontend.send_again()
        self._intake.prepare()
        self._intake.drop_the_gone()
        if time.monotonic() >= self._next_tick:
            self._tick()
        for pool in self._pools():
            self._intake.answer(pool, pool.serving.expired())
            pool.dispatch()

    def _pause(self) -> float:
        """Seconds until something is due."""
        wake = [self._next_tick]
        for pool in self._pools():
            at = pool.serving.wake_at(busy=not pool.counts[1])
            if at is not None:
                wake.append(at)
        return min(wake) - time.monotonic()

    def _pools(self) -> Iterator[Pool]:
        for model in self._models.values():
            yield from model.pools()

    # Workers

    def _on_worker(self, address: Address, message: MessageReader) -> None:
        try:
            self._hear(address, message)
        except Exception:  # a host of another release, or of somebody who has its key, says anything
            log.exception("a message of a worker could not be handled")

    def _hear(self, address: Address, message: MessageReader) -> None:
        header = message.header
        kind, host_id = header.get("kind"), message.id.partition(".")[0]
        pool = next((pool for pool in self._pools() if pool.owns(host_id)), None)
        if kind in ("done", "failed"):
            pool = next((pool for pool in self._pools() if pool.has_worker(address)), None)
            if pool is None:
                self._metrics.dropped("late")
                return
        if pool is None and kind == "host":
            pool = self._welcome(address, header)
        if pool is None:
            if kind == "beat":
                self._sockets.to_worker(address, {"id": host_id, "kind": "who"})
            return
        try:
            arrays, _, body = message.payload({"answers": list})
        except PropellerError as error:
            log.error("a result of a worker cannot be read: %s", error)
            header, arrays, body = {**header, "kind": "failed", "problem": str(error)}, (), None
        self._intake.answer(pool, pool.on_message(address, header, arrays, body))

    def _welcome(self, address: Address, header: Mapping[str, Any]) -> Pool | None:
        """Takes in a host that joins, if it has what is served here."""
        known = _HOST_ID.fullmatch(header["id"]) is not None
        pools = [pool for pool in self._pools() if known and pool.serving.name == header.get("model")]
        for pool in pools:
            if pool.serving.bundle.hash == header.get("bundle") and header.get("version") == __version__:
                pool.join(header["id"], address)
                return pool
        found = ", ".join(f"{name} {str(header.get(name))[:12]}" for name in ("model", "bundle", "version"))
        served = [
            f"{pool.serving.name} {pool.serving.bundle.hash[:12]}" for pool in self._pools()
        ]
        reason = f"it has {found}; served here: {', '.join(served)}, version {__version__}"
        log.warning("a host that wants to join is refused: %s", reason)
        self._sockets.to_worker(address, {"id": "stop", "kind": "stop", "reason": reason})
        return None

    # Life

    def _tick(self) -> None:
        """What is done a few times a second."""
        self._next_tick = time.monotonic() + _TICK_S
        if self._intake.state == READY and self._next_tick >= self._next_link:
            self._next_link = self._next_tick + _LINK_S
            for model in self._models.values():
                model.reload(changed_only=True)
        for model in self._models.values():
            for pool, answered in model.tick():
                self._intake.answer(pool, answered)
        self._intake.answer_late()
        if self._intake.state == STARTING:
            self._check_start()
        if self._intake.state == READY:
            self._companion.tick()

    def _check_start(self) -> None:
        pools = [model.current for model in self._models.values()]
        for pool in pools:
            if pool.problem is not None:
                raise ExportError(f"The model {pool.serving.name} cannot be run: {pool.problem}")
        if not all(pool.is_ready for pool in pools):
            return
        self._intake.state = READY
        metrics = self._metrics_http
        if metrics is not None:
            address = self._sockets.frontends[-1].address
            self._companion.start({"address": address, "metrics": metrics.url})
        workers = worker_plan(self._settings, available_cores())
        what = ", ".join(f"{count} workers x {threads} threads on {name}" for name, count, threads in workers)
        for line in self._sockets.worker_endpoints[1:]:
            log.info("hosts can join at %s", line)
        print(f"READY {self.address} serves {', '.join(self._models)} ({what})", flush=True)

    @contextlib.contextmanager
    def _listening_to_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # embedded: `stop` ends it
            yield
            return
        note = self._signals.append
        before = {number: signal.signal(number, lambda number, _: note(number)) for number in _SIGNALS}
        bell = signal.set_wakeup_fd(self._sockets.bell, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(bell)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int) -> None:
        if number != signal.SIGHUP:
            self.stop()
            return
        log.info("SIGHUP: looking for new versions and keys")
        try:
            self._sockets.reload_keys()
        except PropellerError as error:
            log.error("the keys were not read again: %s", error)
        for model in self._models.values():
            model.reload()

    def stop(self) -> None:
        """Ends the server: what it has is finished within `drain_s`; a second call ends it at once."""
        now = time.monotonic()
        self._drain_until = now if self._intake.state == DRAINING else now + self._settings.drain_s
        self._intake.state = DRAINING
        self._companion.ask_to_end()
        self._sockets.ring()

    def _is_done(self) -> bool:
        if self._intake.state != DRAINING:
            return False
        if time.monotonic() >= self._drain_until:
            return True
        sent = not any(frontend.has_unsent for frontend in self._sockets.frontends)
        return sent and self._companion.has_ended and all(pool.serving.is_empty for pool in self._pools())

    def _end(self) -> int:
        """Answers what is left, and has the workers end."""
        error = Draining("the server has ended")
        self._intake.answer_preparing(error)
        for pool in self._pools():
            self._intake.answer(pool, pool.serving.fail_all(error))
            pool.stop()
        until = min(time.monotonic() + _STOP_S, max(self._drain_until, time.monotonic() + 1.0))
        while time.monotonic() < until and not all(pool.is_gone for pool in self._pools()):
            self._sockets.wait_for_workers(0.05)  # their results are nobody's any more
        return 0

    def _kill_workers(self) -> None:
        for pool in self._pools():
            pool.kill()


def serve(settings: ServerSettings, companion: Sequence[str] = ()) -> int:
    """Runs a server in this process until a signal ends it; see `Server`."""
    if settings.verbose:
        logging.getLogger("propeller").setLevel(logging.DEBUG)
    # Until the loop listens to signals, one that ends the process closes what was opened all the same.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    _allow_many_files()
    sys.setswitchinterval(_SWITCH_S)
    return Server(settings, companion).run()


def _allow_many_files() -> None:
    """Each connection is a file; what many systems allow at first is soon used up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
