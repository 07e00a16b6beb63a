"""The long runs of `serve.py`: a soak at full load, and bulk encoding that is killed and goes on."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from serve_contenders import ENCODER_SERVER
from serve_processes import HOST, Usage, clean_environment, free_port, our_server, usage

from ernie.service.client import ErnieClient

_MAX_ROWS, _TIMEOUT_S, _SAMPLE_S = 32, 60.0, 2.0
# What counts as steady, after a quarter of the time in which caches fill.
_SETTLED = 0.25
_MAX_GROWTH, _MAX_EXTRA_FDS, _MAX_P99_GROWTH = 0.02, 2, 1.25
_MAX_DIFFERENCE = 1e-5
_KILL_AT = (0.3, 0.6)


@dataclasses.dataclass(frozen=True)
class Minute:
    """One line of the soak's table.

    Attributes:
        texts: answered.
        latencies: seconds, of each request.
        used: the server's, at the end of the minute.
    """

    texts: int
    latencies: np.ndarray
    used: Usage

    @property
    def p99_ms(self) -> float:
        """Milliseconds."""
        return float(np.percentile(self.latencies, 99)) * 1000 if len(self.latencies) else float("nan")


class Soak:
    """Threads that ask without pause.

    Args:
        port: the server's.
        texts: what is asked for.
    """

    def __init__(self, port: int, texts: Sequence[str]):
        self._port, self._texts = port, texts
        self._lock = threading.Lock()
        self._done: list[tuple[int, float]] = []
        self._stop = threading.Event()
        self.failed: list[BaseException] = []

    def work(self, seed: int) -> None:
        """One client."""
        rng = random.Random(seed)
        try:
            with ErnieClient(host=HOST, port=self._port, timeout=_TIMEOUT_S) as client:
                while not self._stop.is_set():
                    start, rows = rng.randrange(len(self._texts)), rng.randint(1, _MAX_ROWS)
                    asked = self._texts[start : start + rows]
                    began = time.perf_counter()
                    client(asked)
                    with self._lock:
                        self._done.append((len(asked), time.perf_counter() - began))
        except BaseException as error:
            self.failed.append(error)

    def take(self) -> list[tuple[int, float]]:
        """What was done since the last time: (texts, seconds) of each request."""
        with self._lock:
            done, self._done = self._done, []
        return done

    def stop(self) -> None:
        """Lets all threads end."""
        self._stop.set()


def run_soak(args: argparse.Namespace, texts: Sequence[str]) -> bool:
    """Runs it and prints a line for each minute.

    Returns:
        Whether memory and file handles were flat, p99 steady, and no request failed.
    """
    port = free_port()
    minutes: list[Minute] = []
    print("\n| minute | texts/s | p50 ms | p99 ms | memory MB | processes | file handles |")
    print("|---" * 7 + "|")
    with our_server(ENCODER_SERVER, args.model, port) as server:
        soak = Soak(port, texts)
        threads = [threading.Thread(target=soak.work, args=(n,), daemon=True) for n in range(args.threads)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while len(minutes) < args.soak_minutes and not soak.failed:
            # Short looks at memory in between, so that a peak within a minute counts.
            end, peak = began + (len(minutes) + 1) * args.minute_s, usage(server.pid)
            while (left := end - time.monotonic()) > 0 and not soak.failed:
                time.sleep(min(left, _SAMPLE_S))
                peak = max(peak, usage(server.pid), key=lambda used: used.rss_bytes)
            done = soak.take()
            latencies = np.array([seconds for _, seconds in done])
            minutes.append(Minute(sum(rows for rows, _ in done), latencies, peak))
            _print_minute(len(minutes), minutes[-1], args.minute_s)
        soak.stop()
        for thread in threads:
            thread.join(_TIMEOUT_S)
    for error in soak.failed:
        print(f"a request failed: {error!r}")
    return judge(minutes) and not soak.failed


def _print_minute(number: int, minute: Minute, seconds: float) -> None:
    used = minute.used
    p50 = float(np.median(minute.latencies)) * 1000 if len(minute.latencies) else float("nan")
    cells = [f"{minute.texts / seconds:.0f}", f"{p50:.1f}", f"{minute.p99_ms:.1f}"]
    cells += [f"{used.rss_bytes / (1 << 20):.0f}", str(used.num_processes), str(used.num_fds)]
    print(f"| {number} | {' | '.join(cells)} |", flush=True)


def judge(minutes: Sequence[Minute]) -> bool:
    """Says how memory, file handles and p99 went after the first quarter; whether that is flat."""
    settled = minutes[int(len(minutes) * _SETTLED) :]
    if len(settled) < 3:
        print("too short to be judged")
        return True
    rss = np.array([minute.used.rss_bytes for minute in settled], float)
    slope = float(np.polyfit(np.arange(len(rss)), rss, 1)[0])
    growth = slope * (len(rss) - 1) / rss.mean()
    third = max(1, len(settled) // 3)
    first, last = settled[:third], settled[-third:]
    fds = max(m.used.num_fds for m in last) - max(m.used.num_fds for m in first)
    p99 = float(np.median([m.p99_ms for m in last]) / np.median([m.p99_ms for m in first]))
    print(f"\nafter the first {len(minutes) - len(settled)} minutes:")
    print(f"memory: {slope / (1 << 20):+.2f} MB a minute, {growth:+.1%} in all (at most +{_MAX_GROWTH:.0%})")
    print(f"file handles: {fds:+d} from the first third to the last (at most +{_MAX_EXTRA_FDS})")
    print(f"p99: {p99:.2f} times the first third's in the last (at most {_MAX_P99_GROWTH})")
    return bool(growth <= _MAX_GROWTH and fds <= _MAX_EXTRA_FDS and p99 <= _MAX_P99_GROWTH)


def run_bulk(args: argparse.Namespace, texts: Sequence[str], folder: Path) -> bool:
    """Encodes lines from stdin in one go, and again with kills in between; compares the files.

    Returns:
        Whether they are the same. A row that was computed in another batch may differ by what float32 rounds.
    """
    lines = folder / "lines.txt"
    given = itertools.islice(itertools.cycle(texts), args.lines)
    lines.write_text("".join(f"{' '.join(text.split())}\n" for text in given), "utf-8")
    one, resumed = folder / "one.npy", folder / "resumed.npy"
    port = free_port()
    with our_server(ENCODER_SERVER, args.model, port):
        began = time.monotonic()
        _encode(lines, one, port)
        seconds = time.monotonic() - began
        print(f"\n{args.lines} lines in one go: {args.lines / seconds:.0f} lines/s", flush=True)
        killed = sum(_encode(lines, resumed, port, int(share * one.stat().st_size)) for share in _KILL_AT)
        began = time.monotonic()
        _encode(lines, resumed, port)
        print(f"killed {killed} times; the rest took {time.monotonic() - began:.1f} s")
    # So few lines that they are written at once leave nothing to kill.
    return _compare(one, resumed) and (killed == len(_KILL_AT) or args.quick)


def _compare(one: Path, other: Path) -> bool:
    """Says how two npy files differ; whether that is no more than rounding."""
    if one.read_bytes() == other.read_bytes():
        print("the same bytes: yes")
        return True
    first, second = (np.load(path, mmap_mode="r") for path in (one, other))
    if first.shape != second.shape:
        print(f"the same bytes: no, shapes {first.shape} and {second.shape}")
        return False
    difference = float(np.abs(first - second).max())
    rows = int((first != second).any(axis=1).sum())
    print(f"the same bytes: no, {rows} of {len(first)} rows differ, by at most {difference:.2g}", end="; ")
    print(f"rounding (up to {_MAX_DIFFERENCE:g}): {'yes' if difference <= _MAX_DIFFERENCE else 'NO'}")
    return difference <= _MAX_DIFFERENCE


def _encode(lines: Path, out: Path, port: int, kill_at_bytes: int | None = None) -> bool:
    """Runs the command of bulk encoding.

    Args:
        lines: its standard input.
        out: where vectors go.
        port: the server's.
        kill_at_bytes: it is killed when it has written so much.

    Returns:
        Whether it was killed before it had ended.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "ernie.service.client", "-o", str(out), "--port", str(port)]
    command += ["--timeout", str(_TIMEOUT_S)]
    said = out.with_suffix(".log")
    with lines.open("rb") as source, said.open("wb") as target:
        process = subprocess.Popen(command, stdin=source, stderr=target, env=clean_environment())
    while process.poll() is None:
        written = sum(path.stat().st_size for path in out.parent.glob(f"{out.name}*"))
        if kill_at_bytes is not None and written >= kill_at_bytes:
            process.kill()
            return process.wait() < 0
        time.sleep(0.02)
    if process.returncode:
        end = said.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{end}")
    return False
