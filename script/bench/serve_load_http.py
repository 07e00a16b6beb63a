"""Clients of infinity, for `serve.py`: one event loop, a connection for each request in flight.

Vectors travel as base64: on both sides that costs less than lists of numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import time

import aiohttp
import numpy as np
import orjson
from serve_job import Load, Turn, run_load


async def ask(session: aiohttp.ClientSession, texts: list[str]) -> np.ndarray:
    """One request.

    Returns:
        float32 [texts, dim].
    """
    body = orjson.dumps({"model": "model", "input": texts, "encoding_format": "base64"})
    async with session.post("/embeddings", data=body, headers={"Content-Type": "application/json"}) as reply:
        reply.raise_for_status()
        rows = orjson.loads(await reply.read())["data"]
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), np.float32) for row in rows])


async def ask_all(
    sessions: list[aiohttp.ClientSession], requests: list[list[str]], in_flight: int
) -> tuple[Turn, list[np.ndarray]]:
    """Shares the requests out among clients."""
    numbers = itertools.count()
    replies: list[np.ndarray] = [np.empty(0)] * len(requests)
    latencies = [0.0] * len(requests)

    async def work(session: aiohttp.ClientSession) -> None:
        while (number := next(numbers)) < len(requests):
            began = time.perf_counter()
            replies[number] = await ask(session, requests[number])
            latencies[number] = time.perf_counter() - began

    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*(work(session) for session in sessions for _ in range(in_flight)))
    return Turn(time.perf_counter() - began, latencies, time.process_time() - cpu), replies


async def run(load: Load) -> tuple[Turn, np.ndarray]:
    """Opens the clients and runs the load."""
    timeout = aiohttp.ClientTimeout(total=600)
    address = f"http://{load.host}:{load.port}"
    sessions = [
        aiohttp.ClientSession(address, timeout=timeout, connector=aiohttp.TCPConnector(limit=load.in_flight))
        for _ in range(load.clients)
    ]
    try:
        await ask_all(sessions, load.requests[: load.uncounted], load.in_flight)
        turn, replies = await ask_all(sessions, load.requests, load.in_flight)
    finally:
        for session in sessions:
            await session.close()
    return turn, np.concatenate(replies)


def drive(load: Load, args: argparse.Namespace) -> tuple[Turn, np.ndarray]:
    """Runs the load."""
    return asyncio.run(run(load))


if __name__ == "__main__":
    run_load(__doc__, drive)
