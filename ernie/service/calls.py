"""How jobs are run by an inference client: their requests sent, their results put together."""

from __future__ import annotations

import asyncio

from ernie.service.texts import Encoded, Job
from propeller.errors import ConfigError
from propeller.service.client import AsyncInferenceClient, InferenceClient


def address_of(host: str, port: int) -> str:
    """The address of a server; an IPv6 host is put into brackets.

    Raises:
        ConfigError: the host is an address with a protocol.
    """
    if "://" in host:
        raise ConfigError(f"The host is {host!r}; expected a name or number alone, such as localhost.")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def run(client: InferenceClient, job: Job) -> Encoded:
    """Sends the requests of a job, several at a time, while the next ones are made.

    Raises:
        ServiceError: what the server says, or that it does not answer.
    """
    while job.more():
        for outcome in client.map(job.method, job.inputs(), return_errors=True):
            job.take(outcome)
    return job.result()


async def run_async(client: AsyncInferenceClient, job: Job) -> Encoded:
    """As `run`; what is tokenised here is tokenised beforehand, in a thread, to keep the event loop free."""
    if job.method == "predict":
        await asyncio.to_thread(job.make_all)
    while job.more():
        async for outcome in client.map(job.method, job.inputs(), return_errors=True):
            job.take(outcome)
    return job.result()
