"""Trains with every combination of settings and several seeds, and says which is best on dev.

    ernie tune --output_dir tuned --learning_rate 2e-5,3e-5,5e-5 --batch_size 16,32 --num_epochs 2,3 \\
        --seeds 1,2,3 -- python example/finetune_classifier.py --data_dir DATA --warm_start_from MODEL

What stands behind `--` is any command that takes `--run_config` and `--hparam`; both are added to it. A run
counts with its best evaluation on dev, a combination with the mean over its seeds. Combinations are trained
one after the other. Started again after a stop, it goes on where it was; with other values, it takes the runs
that are there.

Writes `table.tsv`, `plot.png` (where matplotlib is installed) and, of the best run, its bundle `best/`. The
others' bundles are dropped; a run that is the best only of a later search is trained once more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import logging
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from propeller import atomic, signals
from propeller.errors import ConfigError, DataError, Interrupted, PropellerError
from propeller.manifest import CHECKPOINTS

log = logging.getLogger("ernie")

_GRID = {"learning_rate": float, "batch_size": int, "num_epochs": float}
_PLAN, _RESULT = "plan.json", "result.json"
# Of a training: what it printed, and its evaluations.
_LOG, _METRICS = "log.txt", "metrics.jsonl"
_LOOK_S = 1.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        settings: the hyper-parameters that are tried.
        seed: of the run.
        folder: its model_dir.
    """

    settings: Mapping[str, float]
    seed: int
    folder: Path

    @property
    def bundle(self) -> Path:
        """Its best model, until another run's is better."""
        return self.folder / "best" / "inference"

    def __str__(self) -> str:
        return _shown({**self.settings, "seed": self.seed})

    def results(self) -> dict[str, Any] | None:
        """Its best evaluation on dev; None if it did not end yet."""
        path = self.folder / _RESULT
        return json.loads(path.read_text("utf-8")) if path.exists() else None


@dataclasses.dataclass(frozen=True)
class Row:
    """A combination in the table: its settings, and the metric's mean and deviation over the seeds."""

    settings: Mapping[str, float]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Of the sample of seeds; 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="where everything is written")
    for name, kind in _GRID.items():
        parser.add_argument(f"--{name}", type=_numbers(kind), metavar="A,B,...", help="values to try")
    parser.add_argument("--seeds", type=_numbers(int), default=[1, 2, 3], metavar="A,B,...")
    parser.add_argument("--metric", help="what to compare by; default: the one of the training")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="behind --: how to train")
    parser.epilog = "The command that trains, with its own flags, stands behind `--`."


def _numbers(kind: type) -> Any:
    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected numbers such as 16,32, got {text!r}"
            ) from None
        return list(dict.fromkeys(values))

    return parse


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    grid = {name: getattr(args, name) for name in _GRID if getattr(args, name) is not None}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with signals.handled(_stop), (folder / ".lock").open("w") as lock:
        try:
            atomic.lock_file(lock, wait=False)
        except BlockingIOError:
            raise ConfigError(
                f"Another search is writing to {folder}. Wait for it, or name another folder."
            ) from None
        _check_plan(folder, args.command)
        trials = list(_trials(folder, grid, args.seeds))
        done: list[Trial] = []
        for number, trial in enumerate(trials, start=1):
            if trial.results() is None:
                log.info("run %d of %d: %s", number, len(trials), trial)
                _train(trial, args.command, args.metric)
            done.append(trial)
            rows = _sum_up(folder, done, args.metric, grid)
        while not (best := _best_of(done, args.metric)).bundle.exists():
            log.info("once more, since a search before has dropped its bundle: %s", best)
            shutil.rmtree(best.folder)
            _train(best, args.command, args.metric)
            rows = _sum_up(folder, done, args.metric, grid)
    print((folder / "table.tsv").read_text("utf-8"), end="")
    if importlib.util.find_spec("matplotlib") is not None:
        _draw(rows, args.metric or _metric(done[0]), folder / "plot.png")
    return 0


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(
        f"Stopped by {signal.Signals(signum).name}. The same command goes on from there.", signum
    )


def _check_plan(folder: Path, command: Sequence[str]) -> None:
    """Notes the command, and refuses results of another one."""
    path = folder / _PLAN
    if path.exists():
        before = json.loads(path.read_text("utf-8"))["command"]
        if before != list(command):
            raise ConfigError(
                f"{folder} holds results of another command, {shlex.join(before)}. Name another --output_dir."
            )
    atomic.write_text(path, atomic.to_json({"command": command}, indent=1) + "\n")


def _trials(folder: Path, grid: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> Any:
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = "-".join(f"{key}={value:.15g}" for key, value in settings.items())
        for seed in seeds:
            yield Trial(settings, seed, folder / name / f"seed={seed}")


def _shown(settings: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def _train(trial: Trial, command: Sequence[str], metric: str | None) -> None:
    """Runs the command to its end, and keeps of it the result, the log and the bundle.

    Raises:
        PropellerError: it failed.
        ConfigError: its evaluation has no such metric.
        DataError: it exported no best model.
    """
    trial.folder.mkdir(parents=True, exist_ok=True)
    run_config = {"model_dir": str(trial.folder), "seed": trial.seed}
    flags = ["--run_config", json.dumps(run_config), "--hparam", json.dumps(dict(trial.settings))]
    code = _run_to_end([*command, *flags], trial.folder, metric)
    if code:
        path = trial.folder / _LOG
        last = " ".join(path.read_text("utf-8", "replace").strip().splitlines()[-1:]).removesuffix(".")
        raise PropellerError(
            f"The training ended with exit code {code}: {last or 'it printed nothing'}. All it "
            f"said is in {path}. Started again, the search goes on from there."
        )
    best = trial.bundle / "best.json"
    if not best.exists():
        raise DataError("there is none: the command exported no best model", path=best)
    atomic.write_text(trial.folder / _RESULT, best.read_text("utf-8"))
    shutil.rmtree(trial.folder / CHECKPOINTS, ignore_errors=True)  # it is done, nobody goes on with it


def _run_to_end(command: Sequence[str], folder: Path, metric: str | None) -> int:
    """Runs a command, which ends if this process is asked to; returns its exit code."""
    with (folder / _LOG).open("ab") as output:
        try:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                # A training ends at once at the second signal: Ctrl-C is to reach it once, from here.
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started: {error.strerror}.") from error
        try:
            while metric is not None and not _is_known(metric, folder / _METRICS):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(_LOOK_S)
            return process.wait()
        finally:
            if process.poll() is None:  # the wait was cut short: the training saves what it has
                process.terminate()
                process.wait()


def _is_known(metric: str, path: Path) -> bool:
    """Whether the evaluations that a training logs have a metric; False while there is none yet.

    Raises:
        ConfigError: they do not have it.
    """
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []  # the last may be half written
    found = next((line for line in map(json.loads, lines) if line["event"] == "eval"), None)
    if found is not None:
        _number({name: found[name] for name in found.keys() - {"event", "step", "dataset"}}, metric)
    return found is not None


def _results_of(trial: Trial) -> dict[str, Any]:
    results = trial.results()
    if results is None:
        raise DataError("has no result", path=trial.folder)
    found: dict[str, Any] = next(iter(results["results"].values()))
    return found


def _metric(trial: Trial) -> str:
    """The one by which the training chose its best, where it says so; else the first of an evaluation."""
    chosen: str | None = (trial.results() or {}).get("metric")
    return chosen or next(name for name in _results_of(trial) if name not in ("loss", "n"))


def _value(trial: Trial, metric: str | None) -> float:
    return _number(_results_of(trial), metric or _metric(trial))


def _number(found: Mapping[str, Any], name: str) -> float:
    try:
        return float(found[name])  # NaN is spelt out in JSON
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"The evaluation has no number {name!r}; it has {', '.join(sorted(found))}. "
            "Started again with another --metric, the search goes on from there."
        ) from None


def _gain(value: float, metric: str) -> float:
    """What is to be large; NaN is worst."""
    if math.isnan(value):
        return -math.inf
    return -value if metric == "loss" else value


def _table(trials: Sequence[Trial], metric: str | None) -> list[Row]:
    """The combinations, best first."""
    name = metric or _metric(trials[0])
    values: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for trial in trials:
        values.setdefault(tuple(trial.settings.items()), []).append(_value(trial, name))
    rows = [Row(dict(settings), tuple(found)) for settings, found in values.items()]
    return sorted(rows, key=lambda row: _gain(row.mean, name), reverse=True)


def _as_text(rows: Sequence[Row], metric: str, grid: Mapping[str, Any]) -> str:
    lines = [[*grid, f"{metric} mean", "deviation", "best", "of each seed"]]
    for row in rows:
        best = max(row.values, key=lambda value: _gain(value, metric))
        each = " ".join(f"{value:.6g}" for value in row.values)
        numbers = [f"{row.mean:.6g}", f"{row.deviation:.3g}", f"{best:.6g}", each]
        lines.append([f"{value:g}" for value in row.settings.values()] + numbers)
    return "".join("\t".join(line) + "\n" for line in lines)


def _best_of(trials: Sequence[Trial], metric: str | None) -> Trial:
    name = metric or _metric(trials[0])
    return max(trials, key=lambda trial: _gain(_value(trial, name), name))


def _sum_up(
    folder: Path, trials: Sequence[Trial], metric: str | None, grid: Mapping[str, Any]
) -> list[Row]:
    """Keeps the best bundle, and writes the table; returns its rows."""
    rows = _table(trials, metric)
    _keep_best(folder, trials, metric)
    atomic.write_text(folder / "table.tsv", _as_text(rows, metric or _metric(trials[0]), grid))
    return rows


def _keep_best(folder: Path, trials: Sequence[Trial], metric: str | None) -> None:
    """Points `best` at the bundle of the best run, and drops those of the others.

    Where a search before has dropped that one, all stays as it is for now.
    """
    best = _best_of(trials, metric)
    if not best.bundle.exists():
        return
    atomic.swap_link(folder / "best", Path(os.path.realpath(best.bundle)))
    for trial in trials:
        if trial is not best:
            shutil.rmtree(trial.folder / "best", ignore_errors=True)


def _draw(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Draws mean and deviation of every combination, and each seed as a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.5 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(rows))
    means, deviations = [row.mean for row in rows], [row.deviation for row in rows]
    axes.errorbar(means, places, xerr=deviations, fmt="o", capsize=3)
    for place, row in zip(places, rows, strict=True):
        axes.plot(row.values, [place] * len(row.values), ".", color="grey", alpha=0.6)
    axes.set_yticks(list(places), [_shown(row.settings) or "as given" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} on dev: mean, deviation, and each seed")
    figure.savefig(path, dpi=100)
