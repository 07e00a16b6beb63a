"""Hooks that show a run: log lines, a progress bar, summaries, learning curves."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from propeller import atomic
from propeller.paddle import summary
from propeller.paddle.train.hooks import Hook, Results, StepResult
from propeller.types import RunConfig, RunState

log = logging.getLogger("propeller")

METRICS_FILE = "metrics.jsonl"


class LoggingHook(Hook):
    """Logs loss, learning rate, speed over all ranks, epoch and time left; keeps `metrics.jsonl`."""

    name = "logging"

    def train_begin(self, run_config: RunConfig, state: RunState, last_step: int | None) -> None:
        self._log_steps, self._last_step = run_config.log_steps, last_step
        self._path = Path(run_config.model_dir) / METRICS_FILE
        # What comes after the checkpoint that this run goes on from will be made, and logged, once more.
        kept = [
            line
            for line in read_metrics(self._path)
            if line["step"] < state.step + (line["event"] == "train" or not state.evaluation_due)
        ]
        atomic.write_text(self._path, "".join(atomic.to_json(line) + "\n" for line in kept))
        self._sums: dict[str, float] = {}  # since the last log line
        self._since: float | None = None

    def step_begin(self, state: RunState) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def step_end(self, state: RunState, result: StepResult) -> None:
        now, sums = time.monotonic(), self._sums
        seconds = now - self._since if self._since is not None else 0.0
        self._since = now  # waiting for the next batch counts
        self._learning_rate = result.learning_rate
        for name, value in (
            ("steps", 1),
            ("loss", result.loss),
            ("examples", result.num_examples),
            ("tokens", result.num_tokens),
            ("seconds", seconds),
        ):
            sums[name] = sums.get(name, 0) + value
        if state.step % self._log_steps == 0 or state.step == self._last_step:
            self._report(state)

    def _report(self, state: RunState) -> None:
        sums, self._sums = self._sums, {}
        seconds = max(sums["seconds"], 1e-9)
        line = {
            "loss": sums["loss"] / sums["steps"],
            "learning_rate": self._learning_rate,
            "examples_per_s": sums["examples"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
        }
        of, left = "", ""
        if self._last_step is not None:
            of = f"/{self._last_step}"
            left = f", left: {(self._last_step - state.step) * seconds / sums['steps']:.0f} s"
        log.info(
            f"step: {state.step}{of}, epoch: {state.epoch}, loss: {line['loss']:.6f}, "
            f"lr: {line['learning_rate']:.3g}, {line['examples_per_s']:.1f} examples/s, "
            f"{line['tokens_per_s']:.0f} tokens/s{left}"
        )
        self._append(event="train", step=state.step, epoch=state.epoch, **line)

    def eval_end(self, state: RunState, results: Results) -> None:
        for name, metrics in results.items():
            self._append(event="eval", step=state.step, dataset=name, **metrics)
        self._pause()

    def checkpoint_saved(self, state: RunState, path: Path) -> None:
        self._pause()

    def _pause(self) -> None:
        """Evaluations, checkpoints and exports are no training time; the next step starts the clock."""
        self._since = None

    def train_end(self, state: RunState, error: BaseException | None) -> None:
        if self._sums and error is None:  # where the data, or a hook, has ended the run between two log steps
            self._report(state)

    def _append(self, **line: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(atomic.to_json(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; a last line that a crash cut short is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text("utf-8").split("\n"):
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return lines


class ProgressHook(Hook):
    """A tqdm bar on a terminal or in a notebook; nothing where that would fill a log file."""

    name = "progress"

    def train_begin(self, run_config: RunConfig, state: RunState, last_step: int | None) -> None:
        notebook = "ipykernel" in sys.modules
        self._bar = tqdm(
            total=last_step,
            initial=state.step,
            unit="step",
            dynamic_ncols=True,
            disable=not (notebook or sys.stderr.isatty()),
        )

    def step_end(self, state: RunState, result: StepResult) -> None:
        self._bar.set_postfix(loss=f"{result.loss:.4f}", lr=f"{result.learning_rate:.2g}", refresh=False)
        self._bar.update()

    def train_end(self, state: RunState, error: BaseException | None) -> None:
        self._bar.close()


class SummaryHook(Hook):
    """Writes what `propeller.summary` collects, and the metrics, for VisualDL or TensorBoard."""

    name = "summary"

    def train_begin(self, run_config: RunConfig, state: RunState, last_step: int | None) -> None:
        self._log_steps = run_config.log_steps
        self._writer = summary.open_writer(Path(run_config.model_dir) / "summary")

    def step_begin(self, state: RunState) -> None:
        if self._writer is not None and (state.step + 1) % self._log_steps == 0:
            summary.start_collecting()

    def step_end(self, state: RunState, result: StepResult) -> None:
        if self._writer is None or state.step % self._log_steps:
            return
        summary.scalar("train/loss", result.loss)
        summary.scalar("train/learning_rate", result.learning_rate)
        summary.write_collected(self._writer, state.step)

    def eval_end(self, state: RunState, results: Results) -> None:
        if self._writer is None:
            return
        summary.start_collecting()
        for name, metrics in results.items():
            for metric, value in metrics.items():
                if isinstance(value, float | int):
                    summary.scalar(f"{name}/{metric}", value)
        summary.write_collected(self._writer, state.step)

    def train_end(self, state: RunState, error: BaseException | None) -> None:
        summary.stop_collecting()  # a step that failed has left it on
        if self._writer is not None:
            self._writer.close()


class CurvesHook(Hook):
    """Draws `model_dir/curves.png` from `metrics.jsonl` at the end, where matplotlib is installed."""

    name = "curves"

    def train_begin(self, run_config: RunConfig, state: RunState, last_step: int | None) -> None:
        self._folder = Path(run_config.model_dir)

    def train_end(self, state: RunState, error: BaseException | None) -> None:
        lines = read_metrics(self._folder / METRICS_FILE)
        if lines and importlib.util.find_spec("matplotlib") is not None:
            try:
                draw_curves(lines, self._folder / "curves.png")
            except OSError as error:  # no reason to fail a run that is done
                log.warning("no curves: %s", error)


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws the training loss, and every finite metric of every evaluation set, against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        shown: Mapping[str, Any] = {"loss": line["loss"]} if line["event"] == "train" else line
        source = line.get("dataset", "train")
        for metric, value in shown.items():
            if metric not in ("event", "step", "dataset", "n", "elapsed") and isinstance(value, float):
                curves.setdefault(metric, {}).setdefault(source, []).append((line["step"], value))
    if not curves:
        return
    figure = Figure(figsize=(6, 3 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (metric, sources) in enumerate(sorted(curves.items()), start=1):
        axes = figure.add_subplot(len(curves), 1, place)
        for source, points in sources.items():
            axes.plot(*zip(*points, strict=True), label=source, marker="." if source != "train" else None)
        axes.set(xlabel="step", ylabel=metric)
        axes.legend()
    figure.savefig(path, dpi=100)
