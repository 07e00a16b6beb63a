"""Clients of the inference server. They need no Paddle.

    with InferenceClient("tcp://localhost:8888") as client:
        (probabilities,) = client(input_ids, token_type_ids)
        answers = client.answers(["a friendly place", "never again"])

A client connects with its first request, may be used by many threads at once and after a fork, and goes on
working after a timeout or when the server was started again. `AsyncInferenceClient` has the same methods as
coroutines. What is large is split, several requests are kept on their way, and results come in order.

Arrays that are sent must not change before the call returns; arrays that come are writable and the caller's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal

import zmq

from propeller.errors import ConfigError, ServiceError, Unavailable, did_you_mean
from propeller.service import splitting
from propeller.service.auth import secure_client
from propeller.service.client_link import check_address
from propeller.service.connection import Connection
from propeller.service.flow import Flow
from propeller.service.frames import Array
from propeller.service.outbox import Call, Deadline
from propeller.service.splitting import Task
from propeller.service.wire import Reply, Request

_METHODS: dict[str, Callable[[Any, str | None, int], Task]] = {
    "arrays": splitting.of_arrays,
    "predict": splitting.of_named,
    "answers": splitting.of_answers,
    "outputs": splitting.of_outputs,
}
Method = Literal["arrays", "predict", "answers", "outputs"]
# `...` stands for the client's own.
Timeout = float | EllipsisType | None


class _Client:
    """What both clients have in common."""

    def __init__(
        self,
        address: str = "tcp://localhost:8888",
        *,
        timeout: float | None = 10.0,
        model: str | None = None,
        curve_keys: str | Path | None = None,
        max_rows: int = 256,
        max_in_flight: int = 8,
        retry: bool = True,
    ):
        check_address(address)
        Deadline(timeout)
        for name, value in (("max_rows", max_rows), ("max_in_flight", max_in_flight)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if curve_keys is not None:
            _check_keys(curve_keys)
        self.address, self.timeout, self.model = address, timeout, model
        self._curve_keys, self._retry = curve_keys, retry
        self._max_rows, self._max_in_flight = max_rows, max_in_flight
        self._closed = False
        # By process: after a fork the child's is another one. (No lock, which might be held at the fork.)
        self._connections: dict[int, Connection] = {}
        # Not at exit: the thread is a daemon, and waking those that wait for it would only make noise.
        weakref.finalize(self, _close_all, self._connections).atexit = False

    @property
    def dropped_replies(self) -> int:
        """How many replies nobody waited for any more, or could not be read."""
        connection = self._connections.get(os.getpid())
        return connection.outbox.dropped if connection is not None else 0

    def _connection(self) -> Connection:
        if self._closed:
            raise Unavailable("The client was closed; make a new one.")
        connection = self._connections.get(os.getpid())
        if connection is None:
            made = Connection(self.address, self._curve_keys)
            connection = self._connections.setdefault(os.getpid(), made)
        return connection

    def _flow(self, method: str, inputs: Iterable[Any], timeout: Timeout) -> Flow:
        if method not in _METHODS:
            raise ConfigError(
                f"Unknown method {method!r}; expected one of {', '.join(_METHODS)}."
                f"{did_you_mean(method, _METHODS)}"
            )

        def make(given: Any) -> Task:
            return _METHODS[method](given, self.model, self._max_rows)

        return self._flow_of(make, inputs, timeout)

    def _question(self, kind: str, timeout: Timeout) -> Flow:
        return self._flow_of(lambda _: splitting.of_question(kind, self.model), [None], timeout)

    def _flow_of(self, make: Callable[[Any], Task], inputs: Iterable[Any], timeout: Timeout) -> Flow:
        seconds = self.timeout if isinstance(timeout, EllipsisType) else timeout
        Deadline(seconds)

        def send(request: Request, deadline: Deadline) -> Call:
            return self._connection().send(request, deadline, self._retry)

        return Flow(make, inputs, send, seconds, self._max_in_flight)

    def _close(self) -> None:
        self._closed = True
        for connection in list(self._connections.values()):
            connection.close()


def _check_keys(folder: str | Path) -> None:
    """Refuses unusable keys when the client is made, not when it is first used."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        secure_client(socket, folder)


def _close_all(connections: Mapping[int, Connection]) -> None:
    for connection in list(connections.values()):
        connection.close(wait=False)


def _raised(result: Any) -> Any:
    if isinstance(result, ServiceError):
        raise result
    return result


def _until_error(results: Generator[Any, None, None]) -> Iterator[Any]:
    with contextlib.closing(results):
        for result in results:
            yield _raised(result)


class InferenceClient(_Client):
    """Asks an inference server.

    Every method raises what the server answers in place of a result, and:

    - `BadRequest` before anything is sent, for what cannot be;
    - `Unavailable` when nobody answered in time, with the reason as far as it is known, or at once when the
      server's and the client's keys do not fit together;
    - `Overloaded` and `Draining` only when the time was over before the server took the request.

    Args:
        address: `tcp://host:port` or `ipc://path`.
        timeout: seconds that a call may take; None to wait for ever. Each method takes another one.
        model: which of the server's models; None for its first.
        curve_keys: folder with `server.key` and `client.key_secret`; None for a server without keys.
        max_rows: rows or examples of a request; calls with more are split.
        max_in_flight: requests of one call that are on their way at a time.
        retry: ask a full or ending server again, and repeat what was lost with a connection (a prediction
            changes nothing on the server, so that is safe). If not, these raise at once.

    Raises:
        ConfigError: an argument that cannot be used, or no usable keys.
    """

    def __call__(self, *arrays: Any, timeout: Timeout = ...) -> list[Array]:
        """Predicts from arrays.

        Args:
            arrays: the bundle's inputs in its order, each with rows first, as many in each; lists do as well.
            timeout: seconds, in place of the client's.

        Returns:
            The bundle's outputs in its order, row-aligned with the inputs.
        """
        result: list[Array] = self._one(self._flow("arrays", [arrays], timeout))
        return result

    def predict(self, arrays: Mapping[str, Any], *, timeout: Timeout = ...) -> dict[str, Array]:
        """Predicts from arrays by name; returns the outputs by name."""
        result: dict[str, Array] = self._one(self._flow("predict", [arrays], timeout))
        return result

    def answers(self, raws: Sequence[Any], *, timeout: Timeout = ...) -> list[Any]:
        """Has raw examples answered by the bundle's processor.

        Args:
            raws: each a dict of columns, a text (for `{"text_a": text}`) or a tuple of two texts.
            timeout: seconds, in place of the client's.

        Returns:
            One JSON value for each example.
        """
        result: list[Any] = self._one(self._flow("answers", [raws], timeout))
        return result

    def outputs(self, raws: Sequence[Any], *, timeout: Timeout = ...) -> dict[str, Array]:
        """Returns the model's outputs for raw examples by name; for their form see `answers`.

        An output whose second axis follows the length of the longest example is filled up with zeros.
        """
        result: dict[str, Array] = self._one(self._flow("outputs", [raws], timeout))
        return result

    def map(
        self,
        method: Method,
        inputs: Iterable[Any],
        *,
        timeout: Timeout = ...,
        return_errors: bool = False,
    ) -> Iterator[Any]:
        """Runs a method over a stream, several requests at a time, in bounded memory.

        Args:
            method: `answers`, `outputs`, `predict`, or `arrays` for what a plain call does.
            inputs: what the method takes, once for each result (for `arrays` a sequence of arrays). They are
                read as their turn comes.
            timeout: seconds for each input.
            return_errors: give an input's `ServiceError` as its result and go on, rather than raise it.

        Returns:
            The results, in the order of the inputs.
        """
        results = self._results(self._flow(method, inputs, timeout))
        return results if return_errors else _until_error(results)

    def spec(self, *, timeout: Timeout = ...) -> dict[str, Any]:
        """Returns what the model takes and gives: `inputs`, `outputs`, `labels`, `limits`, ..."""
        result: dict[str, Any] = self._one(self._question("spec", timeout))
        return result

    def ping(self, *, timeout: Timeout = ...) -> dict[str, Any]:
        """Returns the server's `status` (`starting`, `ready` or `draining`), `version` and `models`.

        A server that has lost all workers of a model is `starting` again, and gives the `reason`.
        """
        result: dict[str, Any] = self._one(self._question("ping", timeout))
        return result

    def close(self) -> None:
        """Ends the connection; calls of other threads raise `Unavailable`. Does nothing the second time."""
        self._close()

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _one(self, flow: Flow) -> Any:
        with contextlib.closing(self._results(flow)) as results:
            return _raised(next(results))

    def _results(self, flow: Flow) -> Generator[Any, None, None]:
        """Results of a flow, or the errors in their place."""
        with contextlib.closing(flow):
            while flow.advance():
                call = flow.expected
                if call is None:
                    yield flow.pop()
                else:
                    flow.take(self._outcome(call))

    def _outcome(self, call: Call) -> Reply | ServiceError:
        try:
            return call.future.result(call.deadline.left)
        except ServiceError as error:
            return error
        except concurrent.futures.TimeoutError:
            if call.future.cancel():
                return self._connection().unanswered(call)
            return self._outcome(call)  # the reply came at the last moment


class AsyncInferenceClient(_Client):
    """Asks an inference server from asyncio: `InferenceClient` with coroutines for methods.

    One object serves any number of event loops. A task that is cancelled gives up its request; a reply that
    comes all the same is dropped. Arguments, results and errors are those of `InferenceClient`.
    """

    async def __call__(self, *arrays: Any, timeout: Timeout = ...) -> list[Array]:
        """As `InferenceClient.__call__`."""
        result: list[Array] = await self._one(self._flow("arrays", [arrays], timeout))
        return result

    async def predict(self, arrays: Mapping[str, Any], *, timeout: Timeout = ...) -> dict[str, Array]:
        """As `InferenceClient.predict`."""
        result: dict[str, Array] = await self._one(self._flow("predict", [arrays], timeout))
        return result

    async def answers(self, raws: Sequence[Any], *, timeout: Timeout = ...) -> list[Any]:
        """As `InferenceClient.answers`."""
        result: list[Any] = await self._one(self._flow("answers", [raws], timeout))
        return result

    async def outputs(self, raws: Sequence[Any], *, timeout: Timeout = ...) -> dict[str, Array]:
        """As `InferenceClient.outputs`."""
        result: dict[str, Array] = await self._one(self._flow("outputs", [raws], timeout))
        return result

    async def map(
        self,
        method: Method,
        inputs: Iterable[Any],
        *,
        timeout: Timeout = ...,
        return_errors: bool = False,
    ) -> AsyncIterator[Any]:
        """As `InferenceClient.map`; to be iterated with `async for`."""
        async with contextlib.aclosing(self._results(self._flow(method, inputs, timeout))) as results:
            async for result in results:
                yield result if return_errors else _raised(result)

    async def spec(self, *, timeout: Timeout = ...) -> dict[str, Any]:
        """As `InferenceClient.spec`."""
        result: dict[str, Any] = await self._one(self._question("spec", timeout))
        return result

    async def ping(self, *, timeout: Timeout = ...) -> dict[str, Any]:
        """As `InferenceClient.ping`."""
        result: dict[str, Any] = await self._one(self._question("ping", timeout))
        return result

    async def close(self) -> None:
        """As `InferenceClient.close`."""
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> AsyncInferenceClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _one(self, flow: Flow) -> Any:
        async with contextlib.aclosing(self._results(flow)) as results:
            return _raised(await anext(results))

    async def _results(self, flow: Flow) -> AsyncGenerator[Any, None]:
        """Results of a flow, or the errors in their place."""
        with contextlib.closing(flow):
            while flow.advance():
                call = flow.expected
                if call is None:
                    yield flow.pop()
                else:
                    flow.take(await self._outcome(call))

    async def _outcome(self, call: Call) -> Reply | ServiceError:
        try:
            if call.future.done():
                return call.future.result()
            return await asyncio.wait_for(asyncio.wrap_future(call.future), call.deadline.left)
        except ServiceError as error:
            return error
        except asyncio.TimeoutError:
            return self._connection().unanswered(call)
