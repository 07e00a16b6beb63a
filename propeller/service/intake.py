"""Between clients and models: requests come in, replies go out.

    decode -> ping, spec, or predict: check, or prepare in a thread -> admit ... join in a thread -> reply

A thread is taken only for what is a processor's: raw examples, those of several requests together, and
answers that it joins of several parts.

Whatever a message holds, its sender gets one reply if it can be addressed, and the server goes on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple, TypeVar

from propeller.errors import (
    BadRequest,
    DeadlineExceeded,
    Draining,
    PropellerError,
    ServerError,
    ServiceError,
    did_you_mean,
)
from propeller.processor import log_failure
from propeller.service.frames import Frame, Limits
from propeller.service.frontend import Client
from propeller.service.layout import Inputs, Layout
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

_LATE = "the time given to the request was over before it could be prepared"
# Requests of raw examples are prepared together, up to so many bytes: some 32 short texts, 1 ms. Threads have
# so many of such groups at a time; what comes meanwhile makes the next one.
_GROUP_BYTES = 8 << 10
_MAX_GROUPS = 2
_PUBLIC = 0  # the frontend that anybody connects to; the companion, which ends first, has its own


class _Raw(NamedTuple):
    """A request of raw examples that is to be prepared, and the size of its message."""

    client: Client
    pool: Pool
    request: Request
    received: float
    num_bytes: int


class Intake:
    """Takes requests in and replies to them.

    Args:
        models: by name, the default one first.
        sockets: where replies go.
        limits: of a request.
        threads: where raw examples are prepared and answers joined.
        metrics: what is counted.

    Attributes:
        state: `STARTING`, `READY` or `DRAINING`; see also `health`.
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
        self._raws: deque[_Raw] = deque()  # no thread has these yet
        self._num_groups = 0  # that threads have
        # By request, since nothing keeps a client from giving two of them one id.
        self._preparing: dict[Request, tuple[Client, Pool, float]] = {}  # and when it must be answered

    @property
    def health(self) -> str:
        """The state of this moment, and lines that say why: it is `STARTING` while a model has no worker."""
        problems = [model.problem for model in self._models.values() if model.problem is not None]
        return "\n".join([STARTING, *problems]) if self.state == READY and problems else self.state

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
                status, _, reason = self.health.partition("\n")
                result = {"status": status, "version": __version__, "models": list(self._models)}
                result |= {"reason": reason} if reason else {}
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
                self._queue(_Raw(client, pool, request, received, sum(map(len, frames))))
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

    def _queue(self, raw: _Raw) -> None:
        """Has raw examples wait for `prepare`."""
        client, pool, request, received, num_bytes = raw
        pool.serving.reserve(request, num_bytes)
        until = math.inf if request.deadline_ms is None else received + request.deadline_ms / 1000.0
        self._preparing[request] = client, pool, until
        self._raws.append(raw)

    def prepare(self) -> None:
        """Has the raw examples that came in prepared in threads, those of one model together.

        A processor takes hardly longer for several short texts than for one, and so does the way to a thread.
        """
        while self._raws and self._num_groups < _MAX_GROUPS:
            group = [self._raws.popleft()]
            num_bytes = group[0].num_bytes
            while self._raws and self._raws[0].pool is group[0].pool:
                num_bytes += self._raws[0].num_bytes
                if num_bytes > _GROUP_BYTES:
                    break
                group.append(self._raws.popleft())
            self._prepare(group)

    def _prepare(self, group: Sequence[_Raw]) -> None:
        """Has requests to one model prepared in a thread, and admitted afterwards in the loop."""
        self._num_groups += 1

        def prepare() -> dict[Request, Inputs | BaseException]:
            wanted = [raw.request for raw in group if self._is_awaited(raw.request)]
            return dict(zip(wanted, _prepared(group[0].pool.serving.layout, wanted), strict=True))

        def go_on(future: Future[dict[Request, Inputs | BaseException]]) -> None:
            self._num_groups -= 1
            outcomes = future.result()
            for raw in group:
                late = DeadlineExceeded(_LATE, request_id=raw.request.id)
                self._admit(raw, outcomes.get(raw.request, late))

        self._in_thread(go_on, prepare)

    def _is_awaited(self, request: Request) -> bool:
        """Whether somebody still waits for what is to be prepared; may be called by any thread."""
        preparing = self._preparing.get(request)
        return preparing is not None and time.monotonic() < preparing[2]

    def _admit(self, raw: _Raw, outcome: Inputs | BaseException) -> None:
        """Admits a request that has been prepared, unless it has ended meanwhile."""
        client, pool, request, received, num_bytes = raw
        pool.serving.release(request, num_bytes)
        if self._preparing.pop(request, None) is None:
            return
        try:
            pool.serving.admit(client, request, _result(outcome), received)
        except Exception as error:  # a processor is anybody's code
            log_failure(_raised(error))
            self._reply(client, pool, _refusal(request.id, error), received)

    def _join(self, pool: Pool, ticket: Ticket) -> None:
        """Has the answers of a request joined in a thread; until then it counts as not answered."""

        def go_on(future: Future[list[Any]]) -> None:
            result: list[Any] | ServiceError
            try:
                result = _result(future.exception() or future.result())
            except Exception as error:
                log_failure(_raised(error))
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

    def answer_late(self) -> None:
        """Answers what is still being prepared and should have been answered by now."""
        self.answer_preparing(DeadlineExceeded(_LATE), time.monotonic())

    def answer_preparing(self, error: ServiceError, until: float = math.inf) -> None:
        """Answers what is still being prepared, all or what must be answered until some time."""
        for request, (client, pool, deadline) in list(self._preparing.items()):
            if deadline <= until:
                del self._preparing[request]
                self._reply(client, pool, Reply(request.id, error=error), time.monotonic())

    def drop_the_gone(self) -> None:
        """Drops the requests of clients that are gone."""
        for frontend in self._sockets.frontends:
            for client in frontend.gone(self._has_work):
                for request, (whose, _, _) in list(self._preparing.items()):
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
        prepares = any(whose == client for whose, _, _ in self._preparing.values())
        return prepares or any(pool.serving.has_work(client) for pool in self._pools())

    def _pools(self) -> Iterator[Pool]:
        for model in self._models.values():
            yield from model.pools()


def _prepared(layout: Layout, requests: Sequence[Request]) -> list[Inputs | BaseException]:
    """What becomes of each request; for a thread. A bad one harms no other."""
    if len(requests) > 1:
        with contextlib.suppress(BaseException):  # what it is shows when each is tried alone
            return [*layout.prepare_all(requests)]
    outcomes: list[Inputs | BaseException] = []
    for request in requests:
        try:
            outcomes.append(layout.prepare(request))
        except BaseException as error:
            outcomes.append(error)
    return outcomes


def _result(outcome: T | BaseException) -> T:
    """What came of a processor's work.

    Raises:
        Exception: what it raised.
        ServerError: it wanted to end the process, which is not for a processor to say.
    """
    if isinstance(outcome, Exception):
        raise outcome
    if isinstance(outcome, BaseException):
        raise ServerError(f"the processor gave up: {outcome!r}") from outcome
    return outcome


def _raised(error: Exception) -> BaseException:
    """What a processor raised, where that became an error of the service."""
    return error.__cause__ or error if isinstance(error, ServiceError) else error


def _refusal(request_id: str, error: Exception) -> Reply:
    """The reply to a request that is not admitted."""
    return Reply(request_id, error=_as_service_error(error))


def _as_service_error(error: Exception) -> ServiceError:
    """What a client is told."""
    if isinstance(error, ServiceError):
        return error
    text = str(error) if isinstance(error, PropellerError) else f"the server failed: {error!r:.300}"
    return ServerError(text)
