"""Evaluation of an exported model on a labelled file, by the metrics of its training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie.tasks.dual_encoder import DualEncoderProcessor
from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.ner_files import read_ner
from ernie.tasks.sequence_labeling import SequenceLabelingProcessor
from propeller.data import Dataset, prepare_files, source_files
from propeller.errors import ConfigError, DataError
from propeller.metrics import check_names, compute_all
from propeller.metrics.base import label_columns
from propeller.processor import Processor

if TYPE_CHECKING:
    from propeller.paddle.inference import Predictor

BATCH_ROWS = 32


def evaluate_bundle(
    predictor: Predictor,
    processor: Processor,
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    data_format: str | None = None,
    candidates: str | None = None,
) -> dict[str, Any]:
    """Runs the model over a file, or a folder of parts.

    Args:
        predictor: the model.
        processor: its task. Embeddings are judged by how queries find their passages, as a retriever's are.
        path: labelled examples, in a format of the task; for embeddings see `read_pairs`.
        columns: see `Processor.read`.
        data_format: of a file for sequence labelling, see `read_ner`; None recognises it.
        candidates: what embeddings rank for a query, see `DualEncoderProcessor`; None is all passages.

    Returns:
        Every metric of the task by name, and `n`, the model's inputs.

    Raises:
        DataError: the data cannot be used, or has no labels; it names file and line.
        ConfigError: the task reads no files or has no metrics, or an argument is not for this task.
    """
    processor = _judged(processor, candidates)
    read = _reader(processor, columns, data_format)
    metrics = processor.metrics()
    check_names(metrics)
    if not metrics:
        raise ConfigError(f"The task {processor.name!r} has no metrics: there is nothing to evaluate by.")
    examples = prepare_files(
        path.name,
        source_files(path.name, data_dir=path),
        read,
        read_key=None,
        prepare=processor.prepare,
    )
    if not any(name in examples[0] for name in processor.label_names):
        raise DataError(f"has no {' and no '.join(processor.label_names)} to compare with", path=path)
    specs = predictor.bundle.inputs
    pad_values = {spec.name: spec.pad_value for spec in specs} | dict(processor.pad_values)
    for batch in examples.bucket(batch_size=BATCH_ROWS, pad_values=pad_values, key=specs[0].name):
        outputs = predictor.predict({spec.name: batch[spec.name] for spec in specs})
        labels = label_columns(processor.label_names, batch)
        for metric in metrics.values():
            metric.update(outputs, labels, batch)
    return {**compute_all(metrics), "n": len(examples)}


def _judged(processor: Processor, candidates: str | None) -> Processor:
    """The task by which outputs are judged: a bundle of embeddings knows only how these are made."""
    if isinstance(processor, EmbeddingProcessor):
        return DualEncoderProcessor(
            processor.tokenizer, processor.settings, candidates="all" if candidates is None else candidates
        )
    if candidates is not None:
        raise ConfigError(
            f"candidates are for embeddings; the task of this bundle is {processor.name!r}. Leave them out."
        )
    return processor


def _reader(
    processor: Processor, columns: Sequence[str] | None, data_format: str | None
) -> Callable[[Path], Dataset]:
    """What reads a file of the task."""
    if data_format is None:
        return functools.partial(processor.read, columns=columns)
    if not isinstance(processor, SequenceLabelingProcessor):
        raise ConfigError(
            f"data_format is for sequence labels; the task of this bundle is {processor.name!r}. Leave it "
            "out."
        )
    return functools.partial(
        read_ner, columns=columns, format=data_format, scheme=processor.scheme, labels=processor.labels
    )
