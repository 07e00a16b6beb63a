"""Thresholds from which on a label is given, tuned on dev, and put into the bundle that was exported."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from propeller import atomic
from propeller.bundle import Bundle, read_bundle, write_bundle
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError
from propeller.metrics import compute_all
from propeller.metrics.base import Array
from propeller.processor import Processor

if TYPE_CHECKING:
    from ernie.tasks.classification import ClassificationProcessor

log = logging.getLogger("ernie")

_BATCH_ROWS = 32
# Ends the name of a version whose thresholds were tuned.
_TUNED = ".tuned"
# What of `bundle.json` `write_bundle` writes anew.
_WRITTEN = ("format_version", "inputs", "outputs", "axis_limits", "processor", "metrics", "files")


class Predictor(Protocol):
    """An exported model, such as `propeller.Predictor`."""

    def predict(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by name, row-aligned."""
        ...


def best_threshold(probabilities: Array, positive: Array) -> tuple[float, float]:
    """The threshold that gives the highest F1, and that F1.

    All that lie between two probabilities decide alike: 0.5 is taken where it is among them, else their
    middle. Of several that are equally good it is the nearest to 0.5.

    Args:
        probabilities: float `[N]`.
        positive: bool `[N]`, which rows are positive.

    Returns:
        0.5 and 0.0 where no row is positive, which leaves nothing to choose by.

    Raises:
        DataError: there is no row, or a probability is none.
    """
    scores = np.asarray(probabilities, np.float64)
    if not len(scores) or not ((scores >= 0) & (scores <= 1)).all():
        raise DataError("Thresholds are chosen by probabilities from 0 to 1 of at least one row.")
    total = int(np.count_nonzero(positive))
    if not total:
        return 0.5, 0.0
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    taken = np.arange(1, len(ranked) + 1)
    f1 = 2 * np.cumsum(np.asarray(positive, bool)[order]) / (taken + total)
    # A threshold takes all rows of one probability or none.
    below = np.append(ranked[1:], 0.0)
    ends = ranked > below
    ends[-1] = True
    middles = (ranked + below) / 2
    # So near to one another that the middle is the lower: the higher itself takes what it should.
    middles = np.where(middles > below, middles, ranked)
    # What reaches from above 0.5 to below it is best put there.
    middles = np.where((ranked >= 0.5) & (below < 0.5), 0.5, middles)
    best = f1[ends].max()
    candidates = middles[ends][f1[ends] == best]
    return float(candidates[np.argmin(np.abs(candidates - 0.5))]), float(best)


def find_thresholds(processor: ClassificationProcessor, logits: Array, labels: Array) -> dict[str, float]:
    """The best threshold for each label that has one, by F1: the second of two, or each of any number.

    Args:
        processor: the task.
        logits: float `[N, C]`.
        labels: int `[N]` class ids, or `[N, C]` where an example may have any number.

    Raises:
        ConfigError: the task has no thresholds, see `check_thresholds`.
    """
    check_thresholds(processor)
    texts = processor.labels or []
    rows = processor.probabilities(logits)
    if not processor.multi_label:
        return {texts[1]: best_threshold(rows[:, 1], np.asarray(labels).reshape(-1) == 1)[0]}
    return {
        label: best_threshold(rows[:, place], labels[:, place] > 0)[0] for place, label in enumerate(texts)
    }


def check_thresholds(processor: ClassificationProcessor) -> None:
    """Checks that a task's labels are given by thresholds.

    Raises:
        ConfigError: they are not: it is a regression, or one label of three or more is always given.
    """
    if processor.labels is None or (len(processor.labels) > 2 and not processor.multi_label):
        what = "a regression" if processor.labels is None else f"one of {len(processor.labels)} labels"
        raise ConfigError(
            f"--tune_threshold is for two labels, or for examples with any number of them; this is {what}."
        )


def tune_thresholds(link: Path, predictor: Predictor, sets: Mapping[str, Dataset]) -> dict[str, float]:
    """Tunes the thresholds of an exported bundle on the first set, and puts them into it.

    The thresholds stand in the processor's settings, and the metrics of all sets are those with the
    thresholds; see `publish` for the rest.

    Args:
        link: the bundle.
        predictor: its model.
        sets: prepared, labelled examples, unpadded, by set name; the first is the one to tune on.

    Returns:
        The thresholds by label.

    Raises:
        ConfigError: the task has no thresholds.
        ExportError: the bundle cannot be read.
    """
    bundle = read_bundle(link)
    processor: ClassificationProcessor = bundle.processor()  # type: ignore[assignment]
    check_thresholds(processor)
    outputs = {name: _outputs(predictor, bundle, examples) for name, examples in sets.items()}
    first = next(iter(outputs))
    thresholds = find_thresholds(processor, *outputs[first])
    tuned = processor.with_thresholds(thresholds)
    metrics = {name: dict(values) for name, values in bundle.metrics.items()}
    for name, (logits, labels) in outputs.items():
        found = tuned.metrics()
        for metric in found.values():
            metric.update({"logits": logits}, labels, {})
        metrics[name] = {**metrics.get(name, {}), **compute_all(found)}
    publish(link, bundle, tuned, metrics)
    shown = ", ".join(f"{label}: {value:.4f}" for label, value in list(thresholds.items())[:10])
    score = ", ".join(f"{name}: {metrics[first][name]:.6f}" for name in tuned.metrics())
    log.info("thresholds tuned on %s: %s; there now %s", first, shown, score)
    return thresholds


def _outputs(
    predictor: Predictor, bundle: Bundle, examples: Dataset
) -> tuple[npt.NDArray[np.float64], Array]:
    """Logits `[N, C]` and labels of all rows."""
    logits, labels = [], []
    pad_values = {spec.name: spec.pad_value for spec in bundle.inputs}
    for batch in examples.bucket(batch_size=_BATCH_ROWS, pad_values=pad_values, key=bundle.inputs[0].name):
        outputs = predictor.predict({spec.name: batch[spec.name] for spec in bundle.inputs})
        logits.append(np.asarray(outputs["logits"], np.float64))
        labels.append(np.asarray(batch["label"]))
    return np.concatenate(logits), np.concatenate(labels)


def publish(
    link: Path, bundle: Bundle, processor: Processor, metrics: Mapping[str, Mapping[str, Any]]
) -> None:
    """Puts a bundle with the same model and a tuned processor in the place of what `link` leads to.

    It is another version beside the old one, if `link` is a link. `best.json`, by which a run that goes on
    compares, stays as it is.

    Args:
        link: the bundle.
        bundle: what was read there.
        processor: the tuned one.
        metrics: by set name, with what was tuned.
    """
    is_link = link.is_symlink()
    tuned = bundle.folder.with_name(bundle.folder.name.partition(_TUNED)[0] + _TUNED)
    target = atomic.free_path(tuned) if is_link else link
    with atomic.new_folder(target, replace=not is_link) as folder:
        for path in bundle.folder.iterdir():
            shutil.copy(path, folder)
        write_bundle(
            folder,
            inputs=bundle.inputs,
            outputs=bundle.outputs,
            processor=processor,
            metrics=metrics,
            metadata={key: value for key, value in bundle.metadata.items() if key not in _WRITTEN},
            axis_limits=bundle.axis_limits,
        )
    if is_link:
        atomic.swap_link(link, target)
        # As the exporter does: the version before stays, for whoever is just reading it.
        for version in tuned.parent.glob(f"{tuned.name}*"):
            if version not in (target, bundle.folder):
                shutil.rmtree(version)
