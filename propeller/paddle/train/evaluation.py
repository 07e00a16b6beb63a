"""Evaluation: one pass over a set in EVAL mode, streaming its metrics."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from propeller.data import Dataset
from propeller.errors import DataError
from propeller.metrics import Metric, check_names, compute_all
from propeller.metrics.base import label_columns
from propeller.paddle.distributed import Ranks
from propeller.paddle.runtime import paddle
from propeller.paddle.train.model import Batch, Model, run_loss, to_numpy
from propeller.types import RunMode

log = logging.getLogger("propeller")

Results = dict[str, dict[str, Any]]


class CutShort(Exception):
    """An evaluation was asked to stop."""


def evaluate_all(
    model: Model,
    datasets: Mapping[str, Dataset],
    max_batches: int | None,
    step: int,
    *,
    ranks: Ranks,
    stop: Callable[[], bool],
) -> Results:
    """Evaluates every set and logs a line for each; see `evaluate`."""
    results: Results = {}
    for name, dataset in datasets.items():
        started = time.monotonic()
        what = f"The evaluation set {name!r}"
        results[name] = evaluate(model, dataset, max_batches, ranks=ranks, stop=stop, what=what)
        shown = ", ".join(
            f"{key}: {value:.6f}" if isinstance(value, float) else f"{key}: {value}"
            for key, value in results[name].items()
        )
        log.info(
            "[%s evaluation] %s, elapsed: %.1f s, step: %d", name, shown, time.monotonic() - started, step
        )
    return results


def evaluate(
    model: Model,
    dataset: Dataset,
    max_batches: int | None = None,
    *,
    ranks: Ranks,
    stop: Callable[[], bool] = lambda: False,
    what: str = "The evaluation data",
) -> dict[str, Any]:
    """Runs the model over a set in EVAL mode and puts its mode back.

    Each rank takes every `ranks.size`-th batch; what the metrics have seen is then brought together, so
    that all ranks return the same.

    Args:
        model: the live model.
        dataset: batches with labels.
        max_batches: at most so many; None takes all.
        ranks: the processes that evaluate together.
        stop: asked before each batch whether to give up.
        what: how errors call the set.

    Returns:
        `loss` (the mean by the model's own weights), every metric by name, and `n`, the examples.

    Raises:
        DataError: the set is empty, or has no labels.
        ConfigError: see `compute_all`.
        CutShort: `stop` said so, on any rank.
    """
    metrics = model.metrics()
    check_names(metrics)
    total, weight, count = 0.0, 0.0, 0
    before, model.mode = model.mode, RunMode.EVAL
    cut_short = False
    try:
        with paddle.no_grad(), contextlib.closing(dataset.iterate()) as batches:
            for columns, _ in itertools.islice(batches, ranks.rank, max_batches, ranks.size):
                cut_short = stop()
                if cut_short:
                    break
                batch = Batch.of(model, columns)
                predictions = model(batch.features)
                batch_total, batch_weight = run_loss(model, predictions, batch)
                total, weight = total + batch_total.item(), weight + batch_weight
                count += batch.num_examples
                outputs, labels = to_numpy(predictions), label_columns(model.label_names, columns)
                for metric in metrics.values():
                    metric.update(outputs, labels, columns)
    finally:
        model.mode = before
    total, weight, examples, cut = ranks.sum([total, weight, count, cut_short])
    if cut:
        raise CutShort
    if not examples:
        raise DataError(f"{what} gave no batch. Is it empty, or smaller than one batch?")
    if not weight:
        raise DataError(
            f"{what} has a loss of the weight 0: nothing in it counts. Does it have labels that do?"
        )
    for metric in metrics.values():
        _merge(metric, ranks)
    return {"loss": float(total / weight), **compute_all(metrics), "n": int(examples)}


def _merge(metric: Metric, ranks: Ranks) -> None:
    """Brings what the ranks have seen into one metric, the same on each."""
    if ranks.size > 1:
        states = ranks.gather(metric.state())
        metric.reset()
        for state in states:
            metric.merge(state)
