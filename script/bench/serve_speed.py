"""Equality, throughput and latency for `serve.py`: all contenders take turns with the same texts."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from serve_contenders import BARE, INFINITY, REFERENCE, Contender
from serve_job import Load, Turn
from serve_texts import HARD, SHORT, piece

Reports = dict[str, list[Turn]]  # by contender, one for each round

_EQUAL_TEXTS, _LATENCY_CALLS = 1000, 200
_COSINE = {"fp32": 0.9999, "bf16": 0.999}
_MAX_EXTRA_MS = 1.5
# (contender, its rival, least ratio of speeds asked for)
_RATIOS = [
    ("propeller fp32", f"{BARE} fp32", 0.95),
    ("propeller fp32", INFINITY, 2.5),
    ("propeller fp32", REFERENCE, 1.2),
    ("propeller bf16", f"{BARE} bf16", 0.95),
    ("propeller bf16", INFINITY, 4.0),
    ("propeller bf16", "sentence-transformers bf16", None),
]


def make_load(texts: Sequence[str], clients: int, rows: int, in_flight_texts: int, uncounted: int) -> Load:
    """A load that keeps at least so many texts in flight.

    Args:
        texts: what is asked for.
        clients: so many are connected.
        rows: texts a request.
        in_flight_texts: few clients with small requests have several unanswered, to reach it.
        uncounted: texts that are asked for before the clock runs, at least one request for each client.
    """
    in_flight = max(1, -(-in_flight_texts // (clients * rows)))
    first = max(clients * in_flight, -(-uncounted // rows))
    return Load("", 0, list(texts), rows, clients, in_flight, first)


def similarity(vectors: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Cosine of each row with that of the reference."""
    if vectors.shape != reference.shape:
        raise RuntimeError(f"vectors of the shape {vectors.shape} beside {reference.shape}")
    first, second = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors, reference))
    cosines: np.ndarray = (first * second).sum(axis=1)
    return cosines


def lowest_cosines(folder: Path, reference: str | None) -> dict[str, float]:
    """The lowest cosine of each contender that left its vectors in a folder; of none without a reference."""
    if reference is None:
        return {}
    wanted = np.load(folder / f"{reference}.npy")
    return {
        path.stem: float(similarity(np.load(path), wanted).min())
        for path in sorted(folder.glob("*.npy"))
        if path.stem != reference
    }


def is_reached(name: str, cosine: float) -> bool:
    """Whether vectors are as like the reference's as they must be."""
    return cosine > _COSINE[_precision(name)]


def check_equal(contenders: Sequence[Contender], texts: Sequence[str], folder: Path) -> bool:
    """Prints how like the vectors are those of sentence-transformers in fp32, for real and for hard texts."""
    if REFERENCE not in {contender.name for contender in contenders}:
        print(f"\nEqual? Left out: there is no {REFERENCE}.")
        return True
    load = make_load([*HARD, *texts[:_EQUAL_TEXTS]], 4, 8, 32, 0)
    for contender in contenders:
        if BARE not in contender.name:
            contender.run(load, folder / f"{contender.name}.npy")
    reached = True
    print(f"\n| {len(load.texts)} texts | lowest cosine to {REFERENCE} | asked for |\n|---|---|---|")
    for name, cosine in lowest_cosines(folder, REFERENCE).items():
        asked = "-"
        if name.startswith("propeller"):
            asked = f"above {_COSINE[_precision(name)]}: {_yes(is_reached(name, cosine))}"
            reached = reached and is_reached(name, cosine)
        print(f"| {name} | {cosine:.7f} | {asked} |")
    return reached


def measure_throughput(
    contenders: Sequence[Contender], texts: Sequence[str], folder: Path, args: argparse.Namespace
) -> bool:
    """Prints the speeds of all settings and what becomes of the ratios asked for.

    Returns:
        False if a server's vectors were not the reference's.
    """
    settings = [(clients, rows) for clients in args.clients for rows in args.rows]
    reports: dict[tuple[int, int], Reports] = {setting: {} for setting in settings}
    lowest: dict[str, float] = {}
    for number in range(args.rounds):
        for clients, rows in settings:
            size = max(args.texts, 2 * clients * rows)
            load = make_load(piece(texts, number, size), clients, rows, args.in_flight_texts, args.uncounted)
            in_flight = f"{load.in_flight} in flight each"
            print(f"round {number + 1}/{args.rounds}: {clients} clients, {rows} texts a request, {in_flight}")
            turns = _take_turns(contenders, load, folder, reverse=number % 2 == 1)
            for name, turn in turns.items():
                reports[clients, rows].setdefault(name, []).append(turn)
                speed = f"{len(load.texts) / turn.seconds:.1f} texts/s"
                cpu = f", clients {turn.client_cpu_seconds / turn.seconds:.0%} of a core"
                print(f"  {name}: {speed}{cpu if turn.client_cpu_seconds else ''}", flush=True)
            for name, cosine in lowest_cosines(folder, _reference(folder, turns)).items():
                lowest[name] = min(cosine, lowest.get(name, 1.0))
    sizes = {(clients, rows): max(args.texts, 2 * clients * rows) for clients, rows in settings}
    _print_speeds(reports, sizes)
    _print_ratios(reports)
    print("\nlowest cosine of what came back: " + ", ".join(f"{n} {c:.6f}" for n, c in lowest.items()))
    return all(is_reached(name, cosine) for name, cosine in lowest.items() if name.startswith("propeller"))


def _reference(folder: Path, names: Iterable[str]) -> str | None:
    """Whose vectors the others' are compared with: sentence-transformers', or the first that left some."""
    return next((name for name in (REFERENCE, *names) if (folder / f"{name}.npy").exists()), None)


def _take_turns(contenders: Sequence[Contender], load: Load, folder: Path, reverse: bool) -> dict[str, Turn]:
    """One turn for each; the order is reversed from round to round, so that moods of the machine hit all."""
    turns = {}
    for contender in reversed(contenders) if reverse else contenders:
        turns[contender.name] = contender.run(load, folder / f"{contender.name}.npy")
    return {contender.name: turns[contender.name] for contender in contenders}


def _print_speeds(reports: Mapping[tuple[int, int], Reports], sizes: Mapping[tuple[int, int], int]) -> None:
    print("\ntexts/s, median over the rounds; (lowest to highest)\n")
    settings = list(reports)
    print("| clients x texts a request | " + " | ".join(f"{c} x {r}" for c, r in settings) + " |")
    print("|---|" + "---|" * len(settings))
    for name in reports[settings[0]]:
        cells = []
        for setting in settings:
            speeds = [sizes[setting] / turn.seconds for turn in reports[setting][name]]
            cells.append(f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})")
        print(f"| {name} | {' | '.join(cells)} |")


def _fastest(reports: Reports, name: str) -> tuple[str, list[float]] | None:
    """The contender of a name, or the fastest whose name begins so: (its name, seconds of each round)."""
    fitting = {
        one: [turn.seconds for turn in turns]
        for one, turns in reports.items()
        if one == name or (name.startswith(BARE) and one.startswith(name))
    }
    return min(fitting.items(), key=lambda item: statistics.median(item[1]), default=None)


def _print_ratios(reports: Mapping[tuple[int, int], Reports]) -> None:
    print("\nratios of speeds within a round, median over the rounds\n")
    settings = list(reports)
    print("| | asked for | " + " | ".join(f"{c} x {r}" for c, r in settings) + " | |")
    print("|---|---|" + "---|" * (len(settings) + 1))
    for name, rival, asked in _RATIOS:
        cells, ratios, used = [], [], set()
        for setting in settings:
            own, other = _fastest(reports[setting], name), _fastest(reports[setting], rival)
            if own is None or other is None:
                break
            used.add(other[0].removeprefix(rival).strip(", "))
            ratios.append(statistics.median(b / a for a, b in zip(own[1], other[1], strict=True)))
            cells.append(f"{ratios[-1]:.2f}")
        else:
            verdict = "-" if asked is None else _yes(min(ratios) >= asked)
            best = f" (best: {', '.join(sorted(used))})" if any(used) else ""
            print(f"| {name} / {rival}{best} | {asked or '-'} | {' | '.join(cells)} | {verdict} |")


def measure_latency(contenders: Sequence[Contender], folder: Path, args: argparse.Namespace) -> None:
    """Prints p50 and p99 of one short text at a time, beside the bare predictor's."""
    load = make_load([SHORT] * _LATENCY_CALLS, 1, 1, 1, 20)
    latencies: dict[str, list[np.ndarray]] = {contender.name: [] for contender in contenders}
    for number in range(args.rounds):
        for name, turn in _take_turns(contenders, load, folder, reverse=number % 2 == 1).items():
            latencies[name].append(np.asarray(turn.latencies) * 1000)
    medians = {name: [float(np.median(turn)) for turn in turns] for name, turns in latencies.items()}
    print(f"\none text of {len(SHORT.split())} words, {_LATENCY_CALLS} calls a round\n")
    print("| | p50 ms | p99 ms | p50 beyond the bare predictor's best | asked for |\n|---|---|---|---|---|")
    for name, turns in latencies.items():
        pooled, asked, extra = np.concatenate(turns), "-", "-"
        bare = [rounds for one, rounds in medians.items() if one.startswith(f"{BARE} {_precision(name)}")]
        if bare and BARE not in name:
            best = min(bare, key=statistics.median)
            beyond = statistics.median(a - b for a, b in zip(medians[name], best, strict=True))
            extra = f"{beyond:+.2f}"
            if name.startswith("propeller"):
                asked = f"at most +{_MAX_EXTRA_MS}: {_yes(beyond <= _MAX_EXTRA_MS)}"
        print(f"| {name} | {np.median(pooled):.2f} | {np.percentile(pooled, 99):.2f} | {extra} | {asked} |")


def _precision(name: str) -> str:
    return "bf16" if "bf16" in name else "fp32"


def _yes(reached: bool) -> str:
    return "yes" if reached else "NO"
