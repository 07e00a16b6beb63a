"""Fine-tunes ERNIE/BERT for sentences, sentence pairs or regression, and predicts from standard input.

    python example/finetune_classifier.py --data_dir DATA --warm_start_from MODEL \\
        --run_config '{"model_dir": "output", "max_steps": 900}' --hparam '{"batch_size": 32}'
    cat lines | python example/finetune_classifier.py --do_predict --bundle output/best/inference

`num_label: 1` in `--hparam` makes it a regression.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie.tasks import finetuning
from ernie.tasks.classification import (
    ClassificationProcessor,
    file_columns,
    find_labels,
    label_column,
    raw_label_column,
)
from ernie.tasks.finetuning import DataFiles
from ernie.tasks.report import data_report
from ernie.tasks.training import Training
from propeller import cli, launch
from propeller.config import parse_hparam, parse_runconfig
from propeller.data import FeatureColumns
from propeller.data.cache import source_files
from propeller.errors import ConfigError
from propeller.types import HParams, RunConfig

log = logging.getLogger("ernie")


def main() -> int:
    """Parses the flags and trains, or predicts."""
    args = finetuning.argument_parser(str(__doc__)).parse_args()
    run_config, hparams = parse_runconfig(args), parse_hparam(args)
    if not args.do_predict:
        launch.apply_disconfig()
    cli.setup_logging()
    if args.do_predict:
        return finetuning.predict_stdin(args, run_config)
    finetuning.check_hparams(hparams, Training.keys())
    run_config = finetuning.with_precision(run_config, hparams)
    if args.find_learning_rate and args.restart:
        raise ConfigError("--find_learning_rate trains nothing, so there is nothing to --restart.")
    code = launch.relaunch(args.nproc, run_config, restart=args.restart)
    if code is None:
        train(args, run_config, hparams)
    return code or 0


def train(args: argparse.Namespace, run_config: RunConfig, hparams: HParams) -> None:
    """Fine-tunes, evaluates dev and test, and exports the best model by the first metric on dev."""
    training = Training.of(hparams)
    files = DataFiles.of(args)
    config, tokenizer = finetuning.resolve_model(args, hparams)
    names = [name.strip() for name in args.columns.split(",")] if args.columns else None
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

    import propeller.paddle as propeller
    from ernie.tasks.models import ClassificationModel

    size = finetuning.step_batch_size(hparams, run_config, restart=args.restart)
    run_config = finetuning.with_max_steps(run_config, hparams, num_examples=len(sets["train"]), size=size)
    learner = propeller.Learner(
        functools.partial(ClassificationModel, config=config, processor=processor),
        run_config,
        hparams.join(config.to_dict(), {"step_batch_size": size}),  # resolved, for run.json
        finetuning.warm_start_setting(args.warm_start_from),
    )
    train_set = finetuning.batched(sets.pop("train"), hparams, processor, size=size, train=True)
    strategy = finetuning.step_strategy(training)
    if args.find_learning_rate:
        print(learner.find_learning_rate(train_set, step_strategy=strategy).table())
        return
    best = Path(run_config.model_dir) / "best"
    first_metric = next(iter(processor.metrics()))
    learner.train(
        train_set,
        eval_datasets={
            name: finetuning.batched(
                dataset, hparams, processor, size=finetuning.batch_size(hparams), train=False
            )
            for name, dataset in sets.items()
        },
        exporters=[propeller.BestInferenceModelExporter(best, metric=first_metric, processor=processor)],
        step_strategy=strategy,
        restart=args.restart,
    )
    if args.dev_predictions and learner.ranks.is_main:
        finetuning.write_predictions(args.dev_predictions, best / "inference", rows(raw, files.dev))


def rows(columns: FeatureColumns, path: Path) -> Iterator[dict[str, Any]]:
    """Raw examples of a file, or of all parts of a folder."""
    parts = source_files(path.name, data_dir=path)
    return itertools.chain.from_iterable(columns.read(part) for part in parts)


def texts_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes two examples the same."""
    return tuple(row[name] for name in ("text_a", "text_b") if name in row)


if __name__ == "__main__":
    cli.run(main)
