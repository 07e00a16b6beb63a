"""One exception tree for `propeller` and what is built on it.

A message says what was given, what was expected, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class PropellerError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(PropellerError, ValueError):
    """A flag, configuration key or value that cannot be used."""


class DataError(PropellerError):
    """Data that cannot be read.

    Args:
        message: what was found and what was expected.
        path: the file, where there is one.
        line: 1-based line (or record) number in that file.
    """

    def __init__(self, message: str, *, path: str | Path | None = None, line: int | None = None):
        self.path = path
        self.line = line
        where = "" if path is None else f"{path}:{line}: " if line is not None else f"{path}: "
        super().__init__(where + message)


class CheckpointError(PropellerError):
    """A checkpoint or weight file that is missing, damaged or does not fit."""


class ExportError(PropellerError):
    """A model that could not be exported, or a bundle that cannot be served."""


class NonFiniteLossError(PropellerError):
    """Training produced NaN or infinity; the message names the step and the last good checkpoint."""


class RankError(PropellerError):
    """Another rank of the run failed or is gone, so this one cannot go on; the message is its own."""


class Interrupted(PropellerError):
    """A run that was asked to stop by a signal and has saved what it had.

    Args:
        message: what was saved and how to go on.
        signum: the signal.
    """

    def __init__(self, message: str, signum: int):
        self.signum = signum
        super().__init__(message)


# How near (0 to 1) a key must be to a known one to be its misspelling, where unknown keys are allowed:
# `hiden_size` scores 0.95, `learning_rat` 0.96, but `bos_token_id` against `pad_token_id` 0.83.
NEAR_MISS = 0.85


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns `" Did you mean 'x'?"` for the nearest of `known`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


class ServiceError(PropellerError):
    """What a server answers instead of a result, or what a client meets on the way to it.

    Args:
        message: what was found, what was expected, what to do.
        request_id: the request it is about, where that is known.

    Attributes:
        code: stable text by which the error is known on the wire.
    """

    code: str = "service_error"

    def __init__(self, message: str, *, request_id: str | None = None):
        self.request_id = request_id
        super().__init__(message)


class BadRequest(ServiceError):
    """A request that cannot be run; the message says what was found and what the bundle wants."""

    code = "bad_request"


class Overloaded(ServiceError):
    """The queue is full.

    Args:
        message: how full it is.
        retry_after_ms: after how many milliseconds there should be room again; 0 if that is not known.
        request_id: the request it is about, where that is known.
    """

    code = "overloaded"

    def __init__(self, message: str, retry_after_ms: float = 0.0, *, request_id: str | None = None):
        self.retry_after_ms = retry_after_ms
        super().__init__(message, request_id=request_id)


class DeadlineExceeded(ServiceError):
    """The time that the request was given is over; it was not run, or nobody waits for its result."""

    code = "deadline_exceeded"


class WorkerDied(ServiceError):
    """The process that ran the request died, and so did the one that tried it again."""

    code = "worker_died"


class ServerError(ServiceError):
    """The model, or what the server does with its outputs, failed on this request."""

    code = "server_error"


class Draining(ServiceError):
    """The server is about to end and takes no new requests."""

    code = "draining"


class Unavailable(ServiceError):
    """Nobody answered in time. Only a client says so."""

    code = "unavailable"


_BY_CODE: dict[str, type[ServiceError]] = {
    cls.code: cls
    for cls in (BadRequest, Overloaded, DeadlineExceeded, WorkerDied, ServerError, Draining, Unavailable)
}


def error_from(
    code: str, message: str, retry_after_ms: float | None = None, *, request_id: str | None = None
) -> ServiceError:
    """Builds the error that a server put into its reply.

    Args:
        code: the error's `code`; one that this release does not know gives a `ServiceError` that keeps it.
        message: the server's message.
        retry_after_ms: milliseconds, of an `Overloaded`.
        request_id: the request that was answered.
    """
    cls = _BY_CODE.get(code, ServiceError)
    if issubclass(cls, Overloaded):
        return cls(message, retry_after_ms or 0.0, request_id=request_id)
    error = cls(message, request_id=request_id)
    error.code = code
    return error
