"""A server to talk to: real messages, real processor, toy model."""

from __future__ import annotations

import logging
import os
import runpy
from pathlib import Path

import pytest

ToyEncoder = runpy.run_path(str(Path(__file__).with_name("toy_encoder.py")))["ToyEncoder"]


@pytest.fixture
def toy():
    """A server of vectors for texts."""
    with ToyEncoder() as server:
        yield server


@pytest.fixture
def toy_of():
    """Makes a server of other settings; see `ToyEncoder`."""
    servers = []

    def make(**settings):
        servers.append(ToyEncoder(**settings))
        return servers[-1].__enter__()

    yield make
    for server in servers:
        server.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def _own_logging():
    """What a command sets up for its process ends with the test."""
    loggers = [logging.getLogger(name) for name in ("propeller", "ernie")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture(scope="session")
def toy_class():
    """`ToyEncoder`, for servers that several tests share."""
    return ToyEncoder


@pytest.fixture(scope="session")
def clean_environment():
    """What a process of ours is started with: no API key."""
    return {name: value for name, value in os.environ.items() if name != "ERNIE_API_KEY"}
