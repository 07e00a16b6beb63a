"""The server: one loop between clients and workers. No Paddle here.

    client -> frontend -> decode -> check, or prepare in a thread -> admit -> batch -> worker
           <- frontend <- encode <- reply <- rows of the request <- outputs of the batch <-

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from propeller.cores import available_cores
from propeller.errors import (
    BadRequest,
    Draining,
    ExportError,
    PropellerError,
    ServerError,
    ServiceError,
    did_you_mean,
)
from propeller.service.companion import Companion
from propeller.service.frames import Frame, Limits, MessageReader
from propeller.service.frontend import Client
from propeller.service.layout import Inputs
from propeller.service.metrics import Metrics, serve_http
from propeller.service.model import Model, make_pool
from propeller.service.pool import Pool
from propeller.service.serving import Answered
from propeller.service.settings import ServerSettings, worker_plan
from propeller.service.sockets import Address, Sockets
from propeller.service.wire import Reply, Request, decode_request
from propeller.version import __version__

log = logging.getLogger("propeller")

STARTING, READY, DRAINING = "starting", "ready", "draining"

# How often hosts and companions are looked after while nothing else happens, and how often links are read.
_TICK_S, _LINK_S = 0.2, 1.0
# Text is prepared by so many threads: tokenizers let others run meanwhile.
_PREPARE_THREADS = 2
_STOP_S = 10.0
_PUBLIC = 0  # the frontend that anybody connects to; the companion, which ends first, has its own
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
        self._state = STARTING
        self._drain_until = float("inf")
        self._next_tick = self._next_link = 0.0
        self._signals: deque[int] = deque()
        self._results: deque[Callable[[], None]] = deque()  # of threads, to be gone on with in the loop
        # By request, since nothing keeps a client from giving two of them one id.
        self._preparing: dict[Request, tuple[Client, Pool]] = {}
        self._limits = Limits(
            max_message_bytes=settings.max_message_bytes, max_rows=min(settings.max_queue_rows, 1 << 16)
        )
        self._metrics = Metrics()
        self._companion = Companion(companion)
        with contextlib.ExitStack() as stack:
            self._sockets = Sockets(settings, local_clients=self._companion.is_wanted)
            stack.callback(self._sockets.close)
            self._threads = ThreadPoolExecutor(_PREPARE_THREADS, "prepare")
            stack.callback(self._threads.shutdown, wait=False, cancel_futures=True)
            self._models = {}
            for name, path in settings.models.items():
                make = functools.partial(make_pool, settings, name, self._sockets, self._metrics)
                self._models[name] = Model(name, path, make, self._threads)
            self._metrics_http = None
            port = settings.metrics_port
            if port is not None or self._companion.is_wanted:
                bind = settings.metrics_bind
                self._metrics_http = serve_http(self._metrics, lambda: self._state, bind, port or 0)
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
        while self._results:
            self._results.popleft()()
        for frontend in self._sockets.frontends:
            for client, frames in frontend.receive() if frontend.socket in readable else ():
                self._on_request(client, frames)
            frontend.send_again()
            for client in frontend.gone(self._has_work):
                for pool in self._pools():
                    pool.serving.cancel(client)
        if time.monotonic() >= self._next_tick:
            self._tick()
        for pool in self._pools():
            self._answer(pool, pool.serving.expired())
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

    # Requests

    def _on_request(self, client: Client, frames: list[Frame]) -> None:
        received = time.monotonic()
        try:
            request = decode_request(frames, self._limits)
        except BadRequest as error:
            if error.request_id is None:
                self._metrics.dropped("unreadable")
                return
            self._metrics.received("other")
            self._reply(client, None, Reply(error.request_id, error=error), received)
            return
        self._metrics.received(request.kind)
        pool = None
        try:
            if request.kind == "ping":
                result = {"status": self._state, "version": __version__, "models": list(self._models)}
                self._reply(client, None, Reply(request.id, result=result), received)
                return
            pool = self._model_of(request).current
            if request.kind == "spec":
                self._reply(client, pool, Reply(request.id, result=self._spec(pool)), received)
            elif self._state == DRAINING and client.frontend == _PUBLIC:
                raise Draining("the server is about to end and takes no new requests; try another one")
            elif request.raws is None:
                pool.serving.admit(client, request, pool.serving.layout.check(request), received)
            else:
                self._prepare(client, pool, request, received, sum(map(len, frames)))
        except PropellerError as error:
            self._reply(client, pool, _refusal(request.id, error), received)
        except Exception as error:  # nobody's message may end the server
            log.exception("request %s could not be handled", request.id)
            self._reply(client, pool, _refusal(request.id, error), received)

    def _model_of(self, request: Request) -> Model:
        name = next(iter(self._models)) if request.model is None else request.model
        if name not in self._models:
            raise BadRequest(
                f"There is no model {name!r} here.{did_you_mean(name, self._models)} Those served: "
                f"{', '.join(self._models)}."
            )
        return self._models[name]

    def _spec(self, pool: Pool) -> dict[str, Any]:
        limits = {"max_rows": self._limits.max_rows, "max_message_bytes": self._limits.max_message_bytes}
        return {
            "model": pool.serving.name,
            "models": list(self._models),
            **pool.serving.spec(),
            "version": __version__,
            "limits": limits,
        }

    def _prepare(self, client: Client, pool: Pool, request: Request, received: float, size: int) -> None:
        """Has raw examples prepared in a thread, and the request admitted afterwards in the loop."""
        pool.serving.reserve(request, size)
        self._preparing[request] = client, pool
        future = self._threads.submit(pool.serving.layout.prepare, request)

        def go_on() -> None:
            pool.serving.release(request, size)
            if self._preparing.pop(request, None) is None:
                return
            try:
                pool.serving.admit(client, request, future.result(), received)
            except PropellerError as error:
                self._reply(client, pool, _refusal(request.id, error), received)
            except Exception as error:  # a processor is anybody's code
                log.exception("the processor of the model %s failed", pool.serving.name)
                self._reply(client, pool, _refusal(request.id, error), received)

        def done(future: Future[Inputs]) -> None:
            self._results.append(go_on)
            self._sockets.ring()

        future.add_done_callback(done)

    # Replies

    def _answer(self, pool: Pool, answered: Answered) -> None:
        for ticket, reply in answered:
            self._reply(ticket.client, pool, reply, ticket.received)

    def _reply(self, client: Any, pool: Pool | None, reply: Reply, received: float) -> None:
        frontend = self._sockets.frontends[client.frontend]
        try:
            delivered = frontend.send(client.identity, reply)
        except ServerError as error:  # answers that are not JSON
            reply = Reply(reply.id, error=error)
            delivered = frontend.send(client.identity, reply)
        if not delivered:
            self._metrics.dropped("client_gone")
        code = "ok" if reply.error is None else reply.error.code
        log.debug("request %s: %s", reply.id, code)
        self._metrics.answered(None if pool is None else pool.serving.name, code, time.monotonic() - received)

    def _has_work(self, client: Client) -> bool:
        return any(pool.serving.has_work(client) for pool in self._pools())

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
        self._answer(pool, pool.on_message(address, header, arrays, body))

    def _welcome(self, address: Address, header: Mapping[str, Any]) -> Pool | None:
        """Takes in a host that joins, if it has what is served here."""
        known = _HOST_ID.fullmatch(header["id"]) is not None
        pools = [pool for pool in self._pools() if known and pool.serving.name == header.get("model")]
        for pool in pools:
            if pool.serving.bundle.hash == header.get("bundle") and header.get("version") == __version__:
                pool.join(header["id"], address)
                return pool
        log.warning(
            "a host wants to join with the model %s, bundle %.12s, release %s: not what is served here",
            *(header.get(name) for name in ("model", "bundle", "version")),
        )
        self._sockets.to_worker(address, {"id": "stop", "kind": "stop"})
        return None

    # Life

    def _tick(self) -> None:
        """What is done a few times a second."""
        self._next_tick = time.monotonic() + _TICK_S
        if self._state == READY and self._next_tick >= self._next_link:
            self._next_link = self._next_tick + _LINK_S
            for model in self._models.values():
                model.reload(changed_only=True)
        for model in self._models.values():
            for pool, answered in model.tick():
                self._answer(pool, answered)
        if self._state == STARTING:
            self._check_start()
        if self._state == READY:
            self._companion.tick()

    def _check_start(self) -> None:
        pools = [model.current for model in self._models.values()]
        for pool in pools:
            if pool.problem is not None:
                raise ExportError(f"The model {pool.serving.name} cannot be run: {pool.problem}")
        if not all(pool.is_ready for pool in pools):
            return
        self._state = READY
        metrics = self._metrics_http
        if metrics is not None:
            address = self._sockets.frontends[-1].address
            self._companion.start({"address": address, "metrics": f"http://127.0.0.1:{metrics.port}"})
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
        self._drain_until = now if self._state == DRAINING else now + self._settings.drain_s
        self._state = DRAINING
        self._companion.ask_to_end()
        self._sockets.ring()

    def _is_done(self) -> bool:
        if self._state != DRAINING:
            return False
        if time.monotonic() >= self._drain_until:
            return True
        return self._companion.has_ended and all(pool.serving.is_empty for pool in self._pools())

    def _end(self) -> int:
        """Answers what is left, and has the workers end."""
        error = Draining("the server has ended")
        for request, (client, pool) in self._preparing.items():
            self._reply(client, pool, Reply(request.id, error=error), time.monotonic())
        self._preparing.clear()
        for pool in self._pools():
            self._answer(pool, pool.serving.fail_all(error))
            pool.stop()
        until = min(time.monotonic() + _STOP_S, max(self._drain_until, time.monotonic() + 1.0))
        while time.monotonic() < until and not all(pool.is_gone for pool in self._pools()):
            self._sockets.wait_for_workers(0.05)  # their results are nobody's any more
        return 0

    def _kill_workers(self) -> None:
        for pool in self._pools():
            pool.kill()


def _refusal(request_id: str, error: Exception) -> Reply:
    """The reply to a request that is not admitted."""
    if not isinstance(error, ServiceError):
        text = str(error) if isinstance(error, PropellerError) else f"the server failed: {error!r:.300}"
        error = ServerError(text)
    return Reply(request_id, error=error)


def serve(settings: ServerSettings, companion: Sequence[str] = ()) -> int:
    """Runs a server in this process until a signal ends it; see `Server`."""
    if settings.verbose:
        logging.getLogger("propeller").setLevel(logging.DEBUG)
    # Until the loop listens to signals, one that ends the process closes what was opened all the same.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    _allow_many_files()
    return Server(settings, companion).run()


def _allow_many_files() -> None:
    """Each connection is a file; what many systems allow at first is soon used up."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
