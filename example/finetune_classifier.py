"""Fine-tunes ERNIE/BERT for sentences, sentence pairs or regression, and predicts from standard input.

    python example/finetune_classifier.py --data_dir DATA --warm_start_from MODEL \\
        --run_config '{"model_dir": "output", "max_steps": 900}' --hparam '{"batch_size": 32}'
    cat lines | python example/finetune_classifier.py --do_predict --bundle output/best/inference

`num_label: 1` in `--hparam` makes it a regression.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie.tasks import finetuning
from ernie.tasks.arguments import DataFiles, argument_parser, column_names
from ernie.tasks.classification import (
    ClassificationProcessor,
    file_columns,
    find_labels,
    label_column,
    raw_label_column,
)
from ernie.tasks.predicting import write_predictions
from ernie.tasks.report import data_report
from propeller import cli
from propeller.data import FeatureColumns
from propeller.data.cache import source_files
from propeller.types import HParams, RunConfig

log = logging.getLogger("ernie")


def main() -> int:
    """Parses the flags and trains, or predicts."""
    return finetuning.main(argument_parser(str(__doc__)), train)


def train(args: argparse.Namespace, run_config: RunConfig, hparams: HParams) -> None:
    """Fine-tunes, evaluates dev and test, and exports the best model by the first metric on dev."""
    files = DataFiles.of(args)
    config, tokenizer = finetuning.resolve_model(args, hparams)
    names = column_names(args)
    raw = file_columns(raw_label_column(), names=names)
    first = next(rows(raw, files.train))
    log.info("columns of %s: %s", files.train, ", ".join(first))
    processor = ClassificationProcessor(
        tokenizer,
        find_labels(files.train, raw, hparams.get("num_label")),
        max_seqlen=args.max_seqlen,
        pair="text_b" in first,
    )
    columns = file_columns(label_column(processor.labels), pair=processor.pair, names=names)
    unlabelled = file_columns(raw_label_column(optional=True), pair=processor.pair, names=names)
    found = dict(files.items())
    if files.test is not None and "label" not in next(rows(unlabelled, files.test)):
        log.info("test has no labels and is left out")
        del found["test"]
    sets = {
        name: columns.build_dataset(
            name,
            data_dir=path,
            prepare=processor.prepare,
            prepare_key=processor.fingerprint,
            cache_dir=args.cache_dir,
        )
        for name, path in found.items()
    }
    texts = {name: (texts_of(row) for row in rows(columns, path)) for name, path in found.items()}
    log.info("data:\n%s", data_report(sets, texts=texts, processor=processor))

    from ernie.tasks.models import ClassificationModel

    bundle = finetuning.fit(
        ClassificationModel, args, run_config, hparams, config=config, processor=processor, sets=sets
    )
    if args.dev_predictions and bundle is not None:
        write_predictions(args.dev_predictions, bundle, rows(raw, files.dev))


def rows(columns: FeatureColumns, path: Path) -> Iterator[dict[str, Any]]:
    """Raw examples of a file, or of all parts of a folder."""
    parts = source_files(path.name, data_dir=path)
    return itertools.chain.from_iterable(columns.read(part) for part in parts)


def texts_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes two examples the same."""
    return tuple(row[name] for name in ("text_a", "text_b") if name in row)


if __name__ == "__main__":
    cli.run(main)
