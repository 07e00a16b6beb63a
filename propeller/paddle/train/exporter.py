"""Exports: the best weights, and the best model as a bundle that can be served.

What is best survives a restart, because it is read from what lies on disk.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.paddle

from propeller import atomic, bundle
from propeller.bundle import ArraySpec
from propeller.errors import ConfigError, ExportError
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.train.hooks import Results, find_result
from propeller.paddle.train.model import Model, to_numpy
from propeller.processor import Processor
from propeller.types import RunMode, RunState
from propeller.version import __version__

log = logging.getLogger("propeller")

BEST_FILE = "best.json"
WEIGHTS = "model.safetensors"
# Rows of a real batch that a bundle keeps to test itself with.
PROBE_ROWS = 8
# Lengths that rows are cut to, and filled up again, to see whether a model ignores padding.
_CUTS = (4, 1 << 30)


class Exporter(abc.ABC):
    """Called by the loop after each evaluation."""

    @abc.abstractmethod
    def begin(self, state: RunState) -> None:
        """A run starts anew (step 0) or goes on from `state`."""

    @abc.abstractmethod
    def export(self, model: Model, state: RunState, results: Results, columns: Mapping[str, Any]) -> None:
        """Exports if there is a reason to.

        Args:
            model: the live model.
            state: how far the run is.
            results: the evaluation, by set and metric name.
            columns: a real batch.
        """


class BestExporter(Exporter):
    """Keeps the best weights in `folder/weights/` (`model.safetensors`, `best.json`).

    The first evaluation exports whatever its value.

    Args:
        folder: where to write.
        cmp_fn: `(old results, new results) -> is the new one better?`, results by set and metric.
        metric: instead of `cmp_fn`: a metric of the evaluation.
        greater_is_better: its direction; by default `loss` falls and all else rises.
        dataset: the evaluation set it is taken from; None takes the first.
    """

    link_name = "weights"

    def __init__(
        self,
        folder: str | Path,
        cmp_fn: Callable[[Results, Results], bool] | None = None,
        *,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        dataset: str | None = None,
    ):
        if (cmp_fn is None) == (metric is None):
            raise ConfigError("A best exporter needs either cmp_fn or metric, one of the two.")
        self.folder = Path(folder)
        self.link = self.folder / self.link_name
        self._metric, self._dataset = metric, dataset
        self._better = cmp_fn or _by_metric(str(metric), greater_is_better, dataset)
        self._best: Results | None = None

    def begin(self, state: RunState) -> None:
        self._best = None
        if state.step > 0 and (self.link / BEST_FILE).exists():
            best = json.loads((self.link / BEST_FILE).read_text("utf-8"))["results"]
            self._best = {name: _numbers(metrics) for name, metrics in best.items()}

    def export(self, model: Model, state: RunState, results: Results, columns: Mapping[str, Any]) -> None:
        if self._metric is not None:
            find_result(results, self._metric, self._dataset)  # a typing slip shows at the first evaluation
        if self._best is not None and not self._better(self._best, results):
            return
        versions = self.folder / f".{self.link_name}"
        target = atomic.free_path(versions / f"step_{state.step:08d}")
        try:
            with atomic.new_folder(target) as folder:
                self._write(folder, model, results, columns)
                best = {"step": state.step, "metric": self._metric, "results": results}
                (folder / BEST_FILE).write_text(atomic.to_json(best, indent=1) + "\n", "utf-8")
            self._publish(target, versions)
        except OSError as error:
            raise ExportError(
                f"Could not export to {self.link}: {error}. What was exported before is untouched."
            ) from error
        self._best = results
        log.info("exported the best model so far, of step %d, to %s", state.step, self.link)

    def _publish(self, target: Path, versions: Path) -> None:
        """Points the link at the new version and drops those before the last."""
        previous = self.link.resolve() if self.link.is_symlink() else None
        if previous is None and self.link.is_dir():  # a copy of the run, in which the link became a folder
            previous = self.link.rename(atomic.free_path(versions / "copied")).resolve()
        atomic.swap_link(self.link, target)
        # The version before stays, for whoever is just reading it.
        for version in versions.iterdir():
            if version != target and version.resolve() != previous:
                shutil.rmtree(version)

    def _write(self, folder: Path, model: Model, results: Results, columns: Mapping[str, Any]) -> None:
        safetensors.paddle.save_file(model.state_dict(), str(folder / WEIGHTS))


class BestInferenceModelExporter(BestExporter):
    """Keeps the best model as a bundle in `folder/inference/`.

    Each new bundle is loaded again and must give the live model's outputs on a real batch (1e-4 in
    fp32) before it replaces the old one.

    Args:
        folder, cmp_fn, metric, greater_is_better, dataset: as `BestExporter`.
        processor: what turns text into the model's inputs and its outputs into answers.
    """

    link_name = "inference"

    def __init__(
        self,
        folder: str | Path,
        cmp_fn: Callable[[Results, Results], bool] | None = None,
        *,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        dataset: str | None = None,
        processor: Processor | None = None,
    ):
        super().__init__(
            folder, cmp_fn, metric=metric, greater_is_better=greater_is_better, dataset=dataset
        )
        self.processor = processor

    def _write(self, folder: Path, model: Model, results: Results, columns: Mapping[str, Any]) -> None:
        export_bundle(folder, model, columns, processor=self.processor, metrics=results)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Makes numbers again of NaN and infinity, which JSON holds as strings."""
    return {name: float(value) if isinstance(value, str) else value for name, value in metrics.items()}


def _by_metric(
    metric: str, greater_is_better: bool | None, dataset: str | None
) -> Callable[[Results, Results], bool]:
    greater = metric != "loss" if greater_is_better is None else greater_is_better

    def better(old: Results, new: Results) -> bool:
        before, now = find_result(old, metric, dataset), find_result(new, metric, dataset)
        if np.isnan(before):
            return True
        return now > before if greater else now < before

    return better


class _Serving(paddle.nn.Layer):
    """Gives the outputs as a list in known order, since an inference model has no names for them.

    The model is exported through this, since `to_static` changes the layer it is called on.
    """

    def __init__(self, model: Model, outputs: list[str]):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, features: dict[str, paddle.Tensor]) -> Any:
        predictions = self.model(features)
        if not isinstance(predictions, dict):
            return predictions
        return [predictions[name] for name in self.outputs]


def export_bundle(
    folder: Path,
    model: Model,
    columns: Mapping[str, Any],
    *,
    processor: Processor | None,
    metrics: Results,
) -> None:
    """Writes a bundle into an empty folder and checks it against the live model.

    Args:
        folder: where to write.
        model: the live model; its mode is put back.
        columns: a real batch, for the comparison.
        processor: see `BestInferenceModelExporter`.
        metrics: evaluation results to store.

    Raises:
        ExportError: the model declares no inputs or cannot be traced, or the bundle's outputs are not
            the model's.
    """
    if model.inputs is None:
        raise ExportError(
            f"{type(model).__name__} cannot be exported: it does not say what it takes. Declare "
            "inputs = (ArraySpec('input_ids', 'int64', ('batch', 'seq_len')), ...) in the class."
        )
    missing = [spec.name for spec in model.inputs if spec.name not in columns]
    if missing:
        raise ExportError(f"The batch lacks the inputs {', '.join(missing)}; it has {', '.join(columns)}.")
    arrays = {spec.name: np.asarray(columns[spec.name])[:PROBE_ROWS] for spec in model.inputs}
    with _predicting(model):
        expected = to_numpy(model({name: paddle.to_tensor(array) for name, array in arrays.items()}))
        shapes = _save_graph(folder, model, list(expected))
        ignores_padding = _ignores_padding(model, arrays)
    bundle.write_probe(folder, arrays, expected)
    bundle.write_bundle(
        folder,
        inputs=model.inputs,
        outputs=_output_specs(model.inputs, arrays, expected, shapes),
        processor=processor,
        metrics=metrics,
        axis_limits=model.axis_limits,
        metadata={
            "ignores_padding": ignores_padding,
            "versions": {"ernie-propeller": __version__, "paddle": paddle.__version__},
        },
    )
    Predictor(folder, device=paddle.get_device())  # compares itself with the probe


def _ignores_padding(model: Model, arrays: Mapping[str, np.ndarray]) -> bool:
    """Tries whether rows give the same outputs with and without pad values behind them.

    The batch is cut short along every axis that varies, which leaves rows without padding, and run as it is
    and filled up again to twice the length. Where no output is a float the question is left open, that is
    no: labels may stay the same by chance.
    """
    varying = {axis for spec in model.inputs or () for axis in spec.axes[1:] if isinstance(axis, str)}
    if not varying:
        return True
    for length in _CUTS:
        short, padded = _cut_and_filled(model, arrays, length)
        try:
            plain, filled = (
                to_numpy(model({name: paddle.to_tensor(array) for name, array in given.items()}))
                for given in (short, padded)
            )
        except Exception as error:  # the user's code may insist on a size
            log.debug("%s was not tried with padding: %s", type(model).__name__, error)
            return False
        if not any(array.dtype.kind == "f" for array in plain.values()):
            return False
        for name, array in plain.items():
            same = filled[name][tuple(slice(size) for size in array.shape)]
            if same.shape != array.shape or not np.allclose(same, array, rtol=1e-4, atol=1e-4):
                return False
    return True


def _cut_and_filled(
    model: Model, arrays: Mapping[str, np.ndarray], length: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The batch with at most `length` along every axis that varies, and that filled up with pad values."""
    short, padded = {}, {}
    for spec in model.inputs or ():
        array = arrays[spec.name]
        cut, shape = [slice(None)] * array.ndim, list(array.shape)
        for place, axis in enumerate(spec.axes[1:], start=1):
            if isinstance(axis, str):
                cut[place] = slice(max(1, min(length, array.shape[place] - 1)))
                shape[place] = min(2 * shape[place] + 1, (model.axis_limits or {}).get(axis, 1 << 30))
        short[spec.name] = array[tuple(cut)]
        padded[spec.name] = np.full(shape, spec.pad_value, array.dtype)
        padded[spec.name][tuple(cut)] = short[spec.name]
    return short, padded


def _save_graph(folder: Path, model: Model, outputs: list[str]) -> list[tuple[int, ...]]:
    """Traces and saves the inference model; returns the shapes of its outputs, -1 where they vary."""
    serving = _Serving(model, outputs)
    serving.eval()
    specs = {
        spec.name: paddle.static.InputSpec(
            [axis if isinstance(axis, int) else None for axis in spec.axes], spec.dtype, spec.name
        )
        for spec in model.inputs or ()
    }
    try:
        with _writable_home():
            static = paddle.jit.to_static(serving, input_spec=[specs], full_graph=True)
            paddle.jit.save(static, str(folder / bundle.MODEL))
    except OSError:  # of the disk, not of the model
        raise
    except Exception as error:  # tracing runs the user's code, and raises whatever that or Paddle does
        raise ExportError(
            f"{type(model).__name__} cannot be exported: {str(error).strip()} (Its forward must use every "
            f"declared input: {', '.join(specs)}.)"
        ) from error
    return [tuple(output.shape) for output in static.forward.outputs]


@contextlib.contextmanager
def _writable_home() -> Iterator[None]:
    """Lends a home folder where there is none that can be written: Paddle puts the code it traces there."""
    if _has_home():
        yield
        return
    before = os.environ.get("HOME")
    with tempfile.TemporaryDirectory(prefix="propeller-", ignore_cleanup_errors=True) as folder:
        os.environ["HOME"] = folder
        try:
            yield
        finally:
            os.environ.pop("HOME")
            os.environ.update({} if before is None else {"HOME": before})


def _has_home() -> bool:
    try:
        cache = Path("~/.cache/paddle").expanduser()
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except (OSError, RuntimeError):  # the second where the system knows none, as in a container
        return False
    return True


@contextlib.contextmanager
def _predicting(model: Model) -> Iterator[None]:
    before, model.mode = model.mode, RunMode.PREDICT
    try:
        with paddle.no_grad():
            yield
    finally:
        model.mode = before


def _output_specs(
    inputs: tuple[ArraySpec, ...],
    arrays: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    shapes: list[tuple[int, ...]],
) -> list[ArraySpec]:
    """Names the axes of the outputs: rows first, then the inputs' varying axis that has the same size."""
    sizes = {
        axis: size
        for spec in reversed(inputs)
        for axis, size in reversed(list(zip(spec.axes, arrays[spec.name].shape, strict=True))[1:])
        if isinstance(axis, str)
    }
    specs = []
    for (name, array), shape in zip(outputs.items(), shapes, strict=True):
        axes: list[str | int] = ["batch"]
        for place, size in enumerate(shape[1:], start=1):
            alike = [axis for axis in sizes if sizes[axis] == array.shape[place]]
            axes.append(size if size >= 0 else alike[-1] if alike else f"axis_{place}")
        specs.append(ArraySpec(name, str(array.dtype), tuple(axes)))
    return specs
