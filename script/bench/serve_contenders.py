"""Those that `serve.py` compares: each takes its turn with the same load."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import serve_batches as batches
from serve_job import Load, Turn
from serve_processes import HOST, Process, free_port, infinity, offline, our_server, run_load, usage

from ernie.service.export import encoder_bundle
from propeller.bundle import Bundle, read_bundle
from propeller.cores import available_cores
from propeller.service.plan import batch_limits
from propeller.service.settings import ServerSettings, default_workers

HERE = Path(__file__).resolve().parent
ENCODER_SERVER = [sys.executable, str(HERE.parents[1] / "ernie/service/encoder_server.py")]
REFERENCE = "sentence-transformers fp32"
INFINITY = "infinity fp32"
BARE = "bare predictor"


class Contender(Protocol):
    """One that takes its turn."""

    name: str

    def run(self, load: Load, vectors: Path) -> Turn:
        """Does the load; the vectors go to an npy file, in order, where the contender keeps the order."""


@dataclasses.dataclass
class Server:
    """A server and what asks it."""

    name: str
    command: list[str]
    port: int
    process: Process

    def run(self, load: Load, vectors: Path) -> Turn:
        """See `Contender`; in a process of its own."""
        return run_load(self.command, dataclasses.replace(load, host=HOST, port=self.port), vectors)


@dataclasses.dataclass
class Library:
    """sentence-transformers' `encode`, which gets all texts at once, or one if a request is one."""

    name: str
    process: Process
    folder: Path

    def run(self, load: Load, vectors: Path) -> Turn:
        """See `Contender`."""
        alone = load.rows * load.in_flight * load.clients == 1
        work = self.folder / "texts.json"
        for texts in (load.texts[: load.uncounted * load.rows], load.texts):
            work.write_text(json.dumps({"texts": texts, "rows": 1 if alone else None}))
            answer = self.process.ask({"work": str(work), "out": str(vectors)})
        return Turn(sum(answer["seconds"]), answer["seconds"])


@dataclasses.dataclass
class Bare:
    """`Predictor.predict` on the batches that our server makes; several processes share them."""

    name: str
    processes: list[Process]
    plan: Callable[[Load], list[batches.Arrays]]
    folder: Path

    def run(self, load: Load, vectors: Path) -> Turn:
        """See `Contender`; gives no vectors, since the order is the batches'."""
        hands = batches.deal(self.plan(load), len(self.processes))
        messages = []
        for number, hand in enumerate(hands):
            work = self.folder / f"batches{number}.npz"
            batches.save_batches(hand, work)
            messages.append({"work": str(work), "out": None})
        with ThreadPoolExecutor(len(self.processes)) as threads:
            for _ in range(2):  # the first time prepares every shape
                answers = list(threads.map(Process.ask, self.processes, messages))
        seconds = [answer["seconds"] for answer in answers]
        # The slowest hand is what all take; reading the batches is not part of it.
        return Turn(max(map(sum, seconds)), [second for hand in seconds for second in hand])


class Plan:
    """Makes the batches of a load once, for all that run them."""

    def __init__(self, bundle: Bundle, bf16: bool):
        self._bundle = bundle
        self._limits = batch_limits(ServerSettings({"model": bundle.folder}, bf16=bf16), bundle)
        self._last: dict[int, tuple[Load, list[batches.Arrays]]] = {}  # by what is in flight

    def __call__(self, load: Load) -> list[batches.Arrays]:
        key = load.clients * load.in_flight
        if key not in self._last or self._last[key][0] != load:
            workers, _ = default_workers(available_cores())
            self._last[key] = load, batches.plan_batches(self._bundle, load, workers, self._limits)
            print(
                f"  batches with {key * load.rows} in flight: {batches.describe(self._last[key][1])}",
                flush=True,
            )
        return self._last[key][1]


Maker = Callable[[contextlib.ExitStack], list[Contender]]


def makers(args: argparse.Namespace, folder: Path) -> dict[str, Maker]:
    """What starts each group of contenders, by the group's name; those whose interpreters are given."""
    made: dict[str, Maker] = {}
    for precision in ("fp32", "bf16"):
        made[f"propeller {precision}"] = functools.partial(_ours, args, precision)
    for precision in ("fp32", "bf16"):
        made[f"{BARE} {precision}"] = functools.partial(_bare, args, precision, folder)
    if args.infinity_python:
        made[INFINITY] = functools.partial(_infinity, args)
    else:
        print("left out: infinity, for want of --infinity-python")
    if args.sentence_transformers_python:
        for precision in ("fp32", "bf16"):
            made[f"sentence-transformers {precision}"] = functools.partial(_library, args, precision, folder)
    else:
        print("left out: sentence-transformers, for want of --sentence-transformers-python")
    return {name: make for name, make in made.items() if args.only in name}


@contextlib.contextmanager
def contenders(args: argparse.Namespace, folder: Path) -> Iterator[list[Contender]]:
    """Starts all of them; they stay up, so that they can take turns.

    Raises:
        SystemExit: `--only` leaves none.
    """
    chosen = makers(args, folder)
    if not chosen:
        raise SystemExit(f"--only {args.only!r}: no contender is called so")
    with contextlib.ExitStack() as stack:
        started = [contender for make in chosen.values() for contender in make(stack)]
        _print_idle(started)
        yield started


def _ours(args: argparse.Namespace, precision: str, stack: contextlib.ExitStack) -> list[Contender]:
    flags = ["--bf16"] if precision == "bf16" else []
    port = free_port()
    process = stack.enter_context(our_server(ENCODER_SERVER, args.model, port, *flags))
    command = [sys.executable, str(HERE / "serve_load.py")]
    return [
        Server(f"propeller {precision}", command, port, process),
        Server(
            f"propeller {precision}, client tokenises",
            [*command, "--vocab", str(args.model / "vocab.txt")],
            port,
            process,
        ),
    ]


def _infinity(args: argparse.Namespace, stack: contextlib.ExitStack) -> list[Contender]:
    port = free_port()
    process = stack.enter_context(infinity(args.infinity_python, args.model, port, "float32"))
    return [Server(INFINITY, [args.infinity_python, str(HERE / "serve_load_http.py")], port, process)]


def _library(
    args: argparse.Namespace, precision: str, folder: Path, stack: contextlib.ExitStack
) -> list[Contender]:
    name = f"sentence-transformers {precision}"
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    script = str(HERE / "serve_sentence_transformers.py")
    command = [args.sentence_transformers_python, script, "--model", str(args.model), "--dtype", dtype]
    return [Library(name, stack.enter_context(offline(name, command)), folder)]


def _bare(
    args: argparse.Namespace, precision: str, folder: Path, stack: contextlib.ExitStack
) -> list[Contender]:
    bundle = read_bundle(encoder_bundle(args.model))
    plan, cores = Plan(bundle, precision == "bf16"), available_cores()
    settings = dict.fromkeys([(1, cores)] if args.quick else [(1, cores), (cores, 1)])
    made: list[Bare] = []
    for processes, threads in settings:
        name = f"{BARE} {precision}, {processes} x {threads} threads"
        command = [sys.executable, str(HERE / "serve_predictor.py"), "--bundle", str(bundle.folder)]
        command += ["--threads", str(threads), *(["--bf16"] if precision == "bf16" else [])]
        started = [stack.enter_context(offline(f"{name} ({n + 1})", command)) for n in range(processes)]
        made.append(Bare(name, started, plan, folder))
    best = Bare(f"full {made[-1].name}", started, functools.partial(_plan_full, plan), folder)
    return [*made, best]


def _plan_full(plan: Plan, load: Load) -> list[batches.Arrays]:
    """The batches of a queue that holds all texts at once: what is lost where few are in flight."""
    return plan(dataclasses.replace(load, clients=1, in_flight=len(load.requests)))


def _print_idle(started: list[Contender], seconds: float = 3.0) -> None:
    """Says what they cost the others while it is not their turn."""
    servers = {one.process.pid: one.name for one in started if isinstance(one, Server)}
    before = {pid: usage(pid).cpu_seconds for pid in servers}
    time.sleep(seconds if servers else 0.0)
    for pid, name in servers.items():
        share = (usage(pid).cpu_seconds - before[pid]) / seconds
        print(f"{name.partition(',')[0]}: {share:.1%} of a core while idle", flush=True)
