"""The exception tree of the service; the other errors are tested where they are raised."""

from __future__ import annotations

import copy
import pickle

import pytest

from propeller import errors
from propeller.errors import (
    BadRequest,
    DeadlineExceeded,
    Draining,
    Overloaded,
    PropellerError,
    ServerError,
    ServiceError,
    Unavailable,
    WorkerDied,
    error_from,
)

CODES = {
    "bad_request": BadRequest,
    "overloaded": Overloaded,
    "deadline_exceeded": DeadlineExceeded,
    "worker_died": WorkerDied,
    "server_error": ServerError,
    "draining": Draining,
    "unavailable": Unavailable,
}


def test_every_service_error_has_a_code_of_its_own():
    found = {value for value in vars(errors).values() if isinstance(value, type)}
    service = {cls for cls in found if issubclass(cls, ServiceError)} - {ServiceError}
    assert {cls.code: cls for cls in service} == CODES
    assert len(service) == len(CODES) and ServiceError.code not in CODES
    assert issubclass(ServiceError, PropellerError)


@pytest.mark.parametrize(("code", "cls"), CODES.items())
def test_an_error_comes_back_by_its_code(code, cls):
    error = error_from(code, "no room", 12.5, request_id="r1")
    assert type(error) is cls and error.code == code
    assert str(error) == "no room" and error.request_id == "r1"
    assert getattr(error, "retry_after_ms", None) == (12.5 if cls is Overloaded else None)
    assert error_from(code, "no room").request_id is None


def test_an_unknown_code_is_kept():
    error = error_from("teapot", "short and stout")
    assert type(error) is ServiceError and error.code == "teapot" and str(error) == "short and stout"
    assert ServiceError.code == ServiceError("another").code == "service_error"


def test_overloaded_without_a_time_to_wait():
    assert error_from("overloaded", "full").retry_after_ms == 0.0
    assert Overloaded("full", 5.0).retry_after_ms == 5.0


@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("code", [*CODES, "teapot"])
def test_errors_can_be_copied(again, code):
    """Pools and futures hand them from one process to another."""
    error = error_from(code, "no room", 7.0, request_id="r1")
    copied = again(error)
    assert type(copied) is type(error) and str(copied) == str(error) and vars(copied) == vars(error)
