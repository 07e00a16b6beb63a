"""Between clients and models: requests come in, replies go out.

    decode -> ping, spec, or predict: check, or prepare in a thread -> admit ... join in a thread -> reply

A thread is taken only for what is a processor's: raw examples, and answers that it joins of several parts.

Whatever a message holds, its sender gets one reply if it can be addressed, and the server goes on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from propeller.errors import (
    BadRequest,
    Draining,
    PropellerError,
    ServerError,
    ServiceError,
    did_you_mean,
)
from propeller.service.frames import Frame, Limits
from propeller.service.frontend import Client
from propeller.service.layout import Inputs
from propeller.service.metrics import Metrics
from propeller.service.model import Model
from propeller.service.pool import Pool
from propeller.service.serving import Answered, Ticket
from propeller.service.sockets import Sockets
from propeller.service.wire import Reply, Request, decode_request
from propeller.version import __version__

log = logging.getLogger("propeller")

T = TypeVar("T")

STARTING, READY, DRAINING = "starting", "ready", "draining"

_PUBLIC = 0  # the frontend that anybody connects to; the companion, which ends first, has its own


class Intake:
    """Takes requests in and replies to them.

    Args:
        models: by name, the default one first.
        sockets: where replies go.
        limits: of a request.
        threads: where raw examples are prepared and answers joined.
        metrics: what is counted.

    Attributes:
        state: `STARTING`, `READY` or `DRAINING`.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        sockets: Sockets,
        limits: Limits,
        threads: Executor,
        metrics: Metrics,
    ):
        self._models, self._sockets, self._limits = models, sockets, limits
        self._threads, self._metrics = threads, metrics
        self.state = STARTING
        self._results: deque[Callable[[], None]] = deque()  # of threads, to be gone on with in the loop
        # By request, since nothing keeps a client from giving two of them one id.
        self._preparing: dict[Request, tuple[Client, Pool]] = {}

    def take(self, client: Client, frames: list[Frame]) -> None:
        """Does what a message asks for, at once or in the end."""
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
                result = {"status": self.state, "version": __version__, "models": list(self._models)}
                self._reply(client, None, Reply(request.id, result=result), received)
                return
            pool = self._model_of(request).current
            if request.kind == "spec":
                self._reply(client, pool, Reply(request.id, result=self._spec(pool)), received)
            elif self.state == DRAINING and client.frontend == _PUBLIC:
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

        def go_on(future: Future[Inputs]) -> None:
            pool.serving.release(request, size)
            if self._preparing.pop(request, None) is None:
                return
            try:
                pool.serving.admit(client, request, _outcome(future), received)
            except PropellerError as error:
                self._reply(client, pool, _refusal(request.id, error), received)
            except Exception as error:  # a processor is anybody's code
                log.exception("the processor of the model %s failed", pool.serving.name)
                self._reply(client, pool, _refusal(request.id, error), received)

        self._in_thread(go_on, pool.serving.layout.prepare, request)

    def _join(self, pool: Pool, ticket: Ticket) -> None:
        """Has the answers of a request joined in a thread; until then it counts as not answered."""

        def go_on(future: Future[list[Any]]) -> None:
            result: list[Any] | ServiceError
            try:
                result = _outcome(future)
            except Exception as error:
                log.error("request %s: %s", ticket.request.id, error, exc_info=error.__cause__)
                result = _as_service_error(error)
            self.answer(pool, pool.serving.joined(ticket, result))

        self._in_thread(go_on, pool.serving.layout.join_answers, ticket.inputs, ticket.answers)

    def _in_thread(self, go_on: Callable[[Future[T]], None], work: Callable[..., T], *args: Any) -> None:
        """Has work done in a thread, and goes on with it in the loop."""

        def done(future: Future[T]) -> None:
            self._results.append(lambda: go_on(future))
            self._sockets.ring()

        self._threads.submit(work, *args).add_done_callback(done)

    def go_on(self) -> None:
        """Takes what threads have done."""
        while self._results:
            self._results.popleft()()

    def answer(self, pool: Pool, answered: Answered) -> None:
        """Sends replies of admitted requests, or has their answers joined before that."""
        for ticket, reply in answered:
            if reply is None:
                self._join(pool, ticket)
            else:
                self._reply(ticket.client, pool, reply, ticket.received)

    def answer_preparing(self, error: ServiceError) -> None:
        """Answers what is still being prepared; its arrays are of no use any more."""
        for request, (client, pool) in self._preparing.items():
            self._reply(client, pool, Reply(request.id, error=error), time.monotonic())
        self._preparing.clear()

    def drop_the_gone(self) -> None:
        """Drops the requests of clients that are gone."""
        for frontend in self._sockets.frontends:
            for client in frontend.gone(self._has_work):
                for request, (whose, _) in list(self._preparing.items()):
                    if whose == client:
                        del self._preparing[request]
                for pool in self._pools():
                    pool.serving.cancel(client)

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
        prepares = any(whose == client for whose, _ in self._preparing.values())
        return prepares or any(pool.serving.has_work(client) for pool in self._pools())

    def _pools(self) -> Iterator[Pool]:
        for model in self._models.values():
            yield from model.pools()


def _outcome(future: Future[T]) -> T:
    """The result of a future that is done.

    Raises:
        ServerError: what ran in it wanted to end the process, which is not for a processor to say.
    """
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise ServerError(f"the processor gave up: {error!r}") from error
    return future.result()


def _refusal(request_id: str, error: Exception) -> Reply:
    """The reply to a request that is not admitted."""
    return Reply(request_id, error=_as_service_error(error))


def _as_service_error(error: Exception) -> ServiceError:
    """What a client is told."""
    if isinstance(error, ServiceError):
        return error
    text = str(error) if isinstance(error, PropellerError) else f"the server failed: {error!r:.300}"
    return ServerError(text)
