"""Evaluation of an exported model on a labelled file, by the metrics of its training."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from propeller.data import prepare_files
from propeller.data.cache import source_files
from propeller.errors import DataError
from propeller.metrics import compute_all
from propeller.processor import Processor

if TYPE_CHECKING:
    from propeller.paddle.inference import Predictor

BATCH_ROWS = 32


def evaluate_bundle(
    predictor: Predictor, processor: Processor, path: Path, *, columns: Sequence[str] | None = None
) -> dict[str, Any]:
    """Runs the model over a file, or a folder of parts.

    Args:
        predictor: the model.
        processor: its task.
        path: labelled examples, in a format of the task.
        columns: see `Processor.read`.

    Returns:
        Every metric of the task by name, and `n`, the model's inputs.

    Raises:
        DataError: the data cannot be used, or has no labels; it names file and line.
        ConfigError: the task reads no files.
    """
    specs = predictor.bundle.inputs
    examples = prepare_files(
        path.name,
        source_files(path.name, data_dir=path),
        functools.partial(processor.read, columns=columns),
        read_key=None,
        prepare=processor.prepare,
    )
    missing = [name for name in processor.label_names if name not in examples[0]]
    if missing:
        raise DataError(f"has no {' and no '.join(missing)} to compare with", path=path)
    pad_values = {spec.name: spec.pad_value for spec in specs} | dict(processor.pad_values)
    metrics = processor.metrics()
    for batch in examples.bucket(batch_size=BATCH_ROWS, pad_values=pad_values, key=specs[0].name):
        outputs = predictor.predict({spec.name: batch[spec.name] for spec in specs})
        labels: Any = {name: batch[name] for name in processor.label_names}
        if len(labels) == 1:
            (labels,) = labels.values()
        for metric in metrics.values():
            metric.update(outputs, labels, batch)
    return {**compute_all(metrics), "n": len(examples)}
