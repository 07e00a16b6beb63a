"""Where the time of a run goes: a table of spans, and a trace for Chrome's viewer or Perfetto.

    with profiler.span("forward"):
        predictions = model(features)
    ...
    profiler.step_done()

For the one thread that trains. A profiler that is off hands out one shared context that does nothing, so
the loop need not ask.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from propeller import atomic
from propeller.paddle.runtime import paddle

log = logging.getLogger("propeller")

STEP_SPANS = ("data", "to_device", "forward", "loss", "backward", "communication", "optimizer", "hooks")
OUTSIDE_SPANS = ("evaluation", "checkpoint", "export")
MODEL_SPANS = ("forward", "loss", "backward", "communication", "optimizer")
# Bounds the trace of a long run; Chrome's viewer gets slow beyond some tens of thousands of events.
TRACED_STEPS = 200
TABLE_FILE, TRACE_FILE = "profile.txt", "trace.json"

_NO_SPAN = contextlib.nullcontext()


class Profiler:
    """Measures named spans of time, step by step.

    A span within another one is taken off the outer one's time. `evaluation`, `checkpoint` and `export`
    are no part of a step, wherever they lie; other spans within them are not looked at. A step is counted
    when it is complete: what an error cut short is left out.

    Args:
        enabled: whether to measure at all.
        device: Paddle's name of the device. Any but the CPU works on while Python goes ahead, so the end
            of every span waits for it: the times are true, and a step is somewhat slower than without.
        rank: which process this is, for the trace.
        warmup_steps: so many first steps do not count: they allocate, and pick and compile kernels.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        enabled: bool,
        *,
        device: str = "cpu",
        rank: int = 0,
        warmup_steps: int = 2,
        clock: Callable[[], int] = time.perf_counter_ns,
    ):
        self.enabled, self.rank = enabled, rank
        self._device, self._warmup_steps, self._clock = device, warmup_steps, clock
        self._wait = None if device.partition(":")[0] == "cpu" else paddle.device.synchronize
        self._inner: list[int] = []  # for each open span, the time of the spans within it
        self._outside_depth = 0
        self._steps = 0  # warm-up included
        self._step_started: int | None = None
        # Of the step at hand.
        self._current: dict[str, int] = {}
        self._current_outside = 0
        # Of all that count.
        self._step_total = 0
        self._in_steps: dict[str, int] = {}
        self._outside: dict[str, int] = {}
        self._outside_times: dict[str, int] = {}
        self._events: list[tuple[str, int, int, dict[str, Any]]] = []

    def span(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Measures the block: one of `STEP_SPANS` or `OUTSIDE_SPANS`, or a step strategy's own name."""
        return self._measured(name) if self.enabled else _NO_SPAN

    @contextlib.contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        outside = name in OUTSIDE_SPANS
        if self._outside_depth and not outside:
            yield
            return
        started = self._clock()
        if self._step_started is None:
            self._step_started = started
        self._inner.append(0)
        self._outside_depth += outside
        try:
            yield
        finally:
            self._outside_depth -= outside
            inner = self._inner.pop()
            if self._wait is not None:
                self._wait()
            self._note(name, started, self._clock() - started, inner)

    def _note(self, name: str, started: int, duration: int, inner: int) -> None:
        if self._inner:
            self._inner[-1] += duration
        if name in OUTSIDE_SPANS:
            self._outside[name] = self._outside.get(name, 0) + duration - inner
            self._outside_times[name] = self._outside_times.get(name, 0) + 1
            if not self._outside_depth:
                self._current_outside += duration
        else:
            self._current[name] = self._current.get(name, 0) + duration - inner
        if 0 <= self._counted_steps < TRACED_STEPS:
            self._events.append((name, started, duration, {}))

    @property
    def _counted_steps(self) -> int:
        """Complete steps after the warm-up; negative while that lasts."""
        return self._steps - self._warmup_steps

    def step_done(self) -> None:
        """Marks the end of a step, outside of all spans; the next one begins here."""
        if not self.enabled:
            return
        now = self._clock()
        started = now if self._step_started is None else self._step_started
        self._steps += 1
        if self._counted_steps > 0:
            self._step_total += now - started - self._current_outside
            for name, duration in self._current.items():
                self._in_steps[name] = self._in_steps.get(name, 0) + duration
            if self._counted_steps <= TRACED_STEPS:
                self._events.append(("step", started, now - started, {"step": self._steps}))
        self._current, self._current_outside, self._step_started = {}, 0, now

    @property
    def outside_model(self) -> float:
        """The share of a step (0 to 1) that is none of `MODEL_SPANS`; NaN before the first step counts."""
        if not self._step_total:
            return float("nan")
        return 1.0 - sum(self._in_steps.get(name, 0) for name in MODEL_SPANS) / self._step_total

    def table(self) -> str:
        """The sums as text: seconds, milliseconds a step, share of a step; what lies outside steps below."""
        lines = []
        steps = max(self._counted_steps, 0)
        if self._step_total:
            lines.append(_line("span", "total s", "ms a step", "share"))
            known = [name for name in STEP_SPANS if name in self._in_steps]
            spans = {name: self._in_steps[name] for name in [*known, *self._in_steps]}
            rest = self._step_total - sum(spans.values())
            for name, total in {**spans, "between spans": rest, "step": self._step_total}.items():
                share = f"{total / self._step_total:.1%}"
                lines.append(_line(name, f"{total / 1e9:.3f}", f"{total / 1e6 / steps:.3f}", share))
            lines.append(f"outside the model: {self.outside_model:.1%} of a step")
        if self._outside:
            lines += ["", _line("outside the steps", "total s", "ms each", "times")]
            for name in OUTSIDE_SPANS:
                if times := self._outside_times.get(name):
                    total = self._outside[name]
                    each = f"{total / 1e6 / times:.3f}"
                    lines.append(_line(name, f"{total / 1e9:.3f}", each, str(times)))
        lines += ["", f"rank {self.rank} on {self._device}: {steps} steps, without the first "
                  f"{min(self._steps, self._warmup_steps)}, which warm up."]  # fmt: skip
        if self._wait is not None:
            lines.append(
                f"Each span ends when {self._device} has done its work: its time is its own, but the steps "
                "are slower than without a profile."
            )
        return "\n".join(lines).strip()

    def trace(self) -> dict[str, Any]:
        """The spans of the first `TRACED_STEPS` steps that count, in Chrome's trace event format.

        Source: the Trace Event Format of the Catapult project, "JSON Object Format", "Complete Events"
        and "Metadata Events": `ts` and `dur` in microseconds, one row for each `pid` and `tid`.
        """
        process = {"name": "process_name", "ph": "M", "pid": self.rank, "tid": 0}
        events = [
            {"name": name, "cat": "train", "ph": "X", "ts": started / 1000, "dur": duration / 1000,
             "pid": self.rank, "tid": 0, "args": args}
            for name, started, duration, args in sorted(self._events, key=lambda event: (event[1], -event[2]))
        ]  # fmt: skip
        return {
            "traceEvents": [{**process, "args": {"name": f"rank {self.rank} ({self._device})"}}, *events],
            "displayTimeUnit": "ms",
            "otherData": {
                "warmup_steps_left_out": self._warmup_steps,
                "traced_steps": min(max(self._counted_steps, 0), TRACED_STEPS),
                "traced_steps_at_most": TRACED_STEPS,
                "synchronized": self._wait is not None,
            },
        }

    def write(self, folder: str | Path) -> None:
        """Writes `profile.txt` and `trace.json`, each whole or not at all; nothing if the profiler is off.

        A disk that is full is logged: it is no reason to fail a run that is done.
        """
        if not self.enabled:
            return
        try:
            atomic.write_text(Path(folder) / TABLE_FILE, self.table() + "\n")
            atomic.write_text(Path(folder) / TRACE_FILE, atomic.to_json(self.trace()) + "\n")
        except OSError as error:
            log.warning("no profile in %s: %s", folder, error)


def _line(name: str, *figures: str) -> str:
    return f"{name:18}" + "".join(f"{figure:>12}" for figure in figures)
