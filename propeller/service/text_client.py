"""A client for those who have texts and want answers. It needs no Paddle and no tokenizer.

    with TextClient("tcp://localhost:8888") as client:
        answer = client("a friendly place")
        answers = client(["a friendly place", ("first", "second"), {"question": "...", "context": "..."}])
        for answer in client.stream(lines):
            ...

Whatever the task of the model is: an answer is what its processor makes of an input, as in `ernie.Pipeline`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from propeller.errors import BadRequest, Overloaded, ServerError, ServiceError, WorkerDied, error_from
from propeller.service.client import InferenceClient, Timeout

# What one input of several may have caused.
_OF_ONE = (BadRequest, ServerError, WorkerDied)


class TextClient:
    """Has texts answered by an inference server. May be used by many threads at once.

    An input is a text, a tuple of two texts, or a dict of what the task reads.

    Args:
        address: `tcp://host:port` or `ipc://path`.
        timeout: seconds that a request of `max_rows` inputs may take; None to wait for ever. A call of many
            inputs takes as long as it needs, while answers come.
        model: which of the server's models; None for its first.
        curve_keys: folder with the keys; None for a server without.
        max_rows: inputs of a request.
        max_in_flight: requests of one call that are on their way at a time, each of `max_rows` inputs.

    Raises:
        ConfigError: an argument that cannot be used, or no usable keys.
    """

    def __init__(
        self,
        address: str = "tcp://localhost:8888",
        timeout: float | None = 10.0,
        model: str | None = None,
        *,
        curve_keys: str | Path | None = None,
        max_rows: int = 16,
        max_in_flight: int = 4,
    ):
        self._client = InferenceClient(
            address,
            timeout=timeout,
            model=model,
            curve_keys=curve_keys,
            max_rows=max_rows,
            max_in_flight=max_in_flight,
        )
        self._max_rows = max_rows

    def __call__(self, inputs: Any, *, timeout: Timeout = ..., return_errors: bool = False) -> Any:
        """Answers one input, or a list of them.

        Args:
            inputs: an input, or a list (or another iterable, but no tuple) of inputs.
            timeout: seconds, in place of the client's.
            return_errors: give an input's error as its answer, rather than raise the first one.

        Returns:
            The answer; of a list the answers, in order.

        Raises:
            BadRequest: an input that the task does not take.
            ServiceError: what else the server says, or that it does not answer.
        """
        if isinstance(inputs, str | tuple | Mapping):
            (outcome,) = self._client.map("answers", [[inputs]], timeout=timeout, return_errors=True)
            if not isinstance(outcome, ServiceError):
                return outcome[0]
            if return_errors:
                return outcome
            raise outcome
        return list(self.stream(inputs, timeout=timeout, return_errors=return_errors))

    def stream(
        self, inputs: Iterable[Any], *, timeout: Timeout = ..., return_errors: bool = False
    ) -> Iterator[Any]:
        """Answers any number of inputs in order, in bounded memory.

        Args:
            inputs: read as their turn comes, no more than those of `max_in_flight` requests ahead.
            timeout, return_errors: as for a call of the client itself.

        Returns:
            An answer for each input.

        Raises:
            BadRequest, ServiceError: as for a call of the client itself; the place of the input is named.
        """
        if isinstance(inputs, str | Mapping):
            raise BadRequest(f"Expected several inputs, got one {type(inputs).__name__}; write [input].")
        if isinstance(inputs, bytes) or not isinstance(inputs, Iterable):
            raise BadRequest(
                f"Expected inputs, got {type(inputs).__name__}; an input is a text, a tuple of two texts, or "
                "a dict."
            )
        return self._results(inputs, timeout, return_errors)

    def _results(self, inputs: Iterable[Any], timeout: Timeout, return_errors: bool) -> Iterator[Any]:
        places = itertools.count()
        for result in self._outcomes(inputs, timeout):
            place = next(places)
            if isinstance(result, ServiceError) and not return_errors:
                wait_ms = result.retry_after_ms if isinstance(result, Overloaded) else None
                named = f"inputs[{place}]: {result}"
                raise error_from(result.code, named, wait_ms, request_id=result.request_id) from result
            yield result

    def _outcomes(self, inputs: Iterable[Any], timeout: Timeout) -> Iterator[Any]:
        """The answer to each input, or the error in its place."""
        sent: deque[list[Any]] = deque()

        def chunks() -> Iterator[list[Any]]:
            iterator = iter(inputs)
            while chunk := list(itertools.islice(iterator, self._max_rows)):
                sent.append(chunk)
                yield chunk

        with contextlib.closing(self._map(chunks(), timeout)) as outcomes:
            for outcome in outcomes:
                chunk = sent.popleft()
                if not isinstance(outcome, ServiceError):
                    yield from outcome
                elif len(chunk) > 1 and isinstance(outcome, _OF_ONE):
                    with contextlib.closing(self._map(([one] for one in chunk), timeout)) as alone:
                        yield from (each if isinstance(each, ServiceError) else each[0] for each in alone)
                else:
                    yield from [outcome] * len(chunk)

    def _map(self, chunks: Iterable[list[Any]], timeout: Timeout) -> Generator[Any, None, None]:
        """The answers to lists of inputs, or errors in their place; what is on its way ends with it."""
        found = self._client.map("answers", chunks, timeout=timeout, return_errors=True)
        return cast(Generator[Any, None, None], found)

    def spec(self, *, timeout: Timeout = ...) -> dict[str, Any]:
        """Returns what the server says of the model: `processor`, `labels`, `metrics`, ..."""
        return self._client.spec(timeout=timeout)

    def close(self) -> None:
        """Ends the connection. Does nothing the second time."""
        self._client.close()

    def __enter__(self) -> TextClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
