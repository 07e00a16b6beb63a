"""Clients of our server, for `serve.py`: threads that call an `ErnieClient` each, or several to one."""

from __future__ import annotations

import argparse
import contextlib

import numpy as np
from serve_job import Load, Turn, ask_in_threads, run_load

from ernie.service.client import ErnieClient

# A queue of 32 clients with 64 texts each takes a while.
TIMEOUT_S = 600.0


def drive(load: Load, args: argparse.Namespace) -> tuple[Turn, np.ndarray]:
    """Runs the load; with `--vocab` the clients tokenise."""
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(ErnieClient(args.vocab, load.host, load.port, timeout=TIMEOUT_S))
            for _ in range(load.clients)
        ]
        ask_in_threads(clients, load.requests[: load.uncounted], load.in_flight)
        turn, replies = ask_in_threads(clients, load.requests, load.in_flight)
    return turn, np.concatenate(replies)


if __name__ == "__main__":
    run_load(__doc__, drive)
