"""The batches that our server makes of a load, for the bare predictor to run offline."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from serve_job import Load

from propeller.bundle import Bundle
from propeller.service.plan import BatchLimits
from propeller.service.serving import Serving, Work
from propeller.service.wire import Request

Arrays = dict[str, np.ndarray]


def plan_batches(
    bundle: Bundle, load: Load, num_workers: int, limits: BatchLimits
) -> list[Arrays]:
    """Plays a load through the server's own queue, in which it keeps all that may be in flight.

    Clients answer at once and all workers take as long for a batch as each other, so nothing is left to
    chance: the batches are those of a server that is kept busy.

    Args:
        bundle: what is served.
        load: the requests and how many are in flight.
        num_workers: batches that run at the same time.
        limits: the server's, for a batch.

    Returns:
        The padded inputs of each batch, in order.
    """
    rows = sum(map(len, load.requests))
    serving = Serving(
        "model",
        bundle,
        limits,
        max_queue_rows=rows,
        max_wait_s=0.0,
        max_message_bytes=1 << 30,
        clock=lambda: 0.0,
    )
    waiting = collections.deque(enumerate(load.requests))
    running: collections.deque[Work] = collections.deque()
    free = collections.deque(client for _ in range(load.in_flight) for client in range(load.clients))
    batches = []
    while True:
        while waiting and free:
            number, texts = waiting.popleft()
            request = Request(str(number), raws=[{"text_a": text} for text in texts], want="arrays")
            serving.admit(free.popleft(), request, serving.layout.prepare(request), 0.0)
        while len(running) < num_workers and (work := serving.next_batch(num_workers - len(running))):
            running.append(work)
            batches.append(work.arrays)
        if not running:
            return batches
        work = running.popleft()
        for ticket, _ in serving.done(work.batch.number, _blank(bundle, len(work.batch.rows)), ()):
            free.append(int(str(ticket.client)))


def _blank(bundle: Bundle, rows: int) -> Arrays:
    """Outputs for a batch that nobody reads."""
    shapes = {
        spec.name: [rows, *(1 if isinstance(axis, str) else axis for axis in spec.axes[1:])]
        for spec in bundle.outputs
    }
    return {spec.name: np.zeros(shapes[spec.name], spec.dtype) for spec in bundle.outputs}


def deal(batches: Sequence[Arrays], hands: int) -> list[list[Arrays]]:
    """Shares batches out so that all hands have about as many cells; the largest first."""
    dealt: list[list[Arrays]] = [[] for _ in range(hands)]
    for batch in sorted(batches, key=_cells, reverse=True):
        min(dealt, key=lambda hand: sum(map(_cells, hand))).append(batch)
    return dealt


def _cells(batch: Arrays) -> int:
    return math.prod(next(iter(batch.values())).shape)


def save_batches(batches: Sequence[Arrays], path: Path) -> None:
    """Writes them as `serve_predictor.py` reads them."""
    numbered = ((f"{number}.{name}", batch[name]) for number, batch in enumerate(batches) for name in batch)
    np.savez(path, **dict(numbered))  # type: ignore[arg-type]


def describe(batches: Sequence[Arrays]) -> str:
    """Rows and cells of a batch, for a line of the report."""
    rows = [len(next(iter(batch.values()))) for batch in batches]
    cells = [_cells(batch) for batch in batches]
    return f"{len(batches)} batches of {np.mean(rows):.1f} rows and {np.mean(cells):.0f} tokens with padding"
