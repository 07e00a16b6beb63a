"""Fine-tunes ERNIE/BERT for sentences, sentence pairs or regression, and predicts from standard input.

    python example/finetune_classifier.py --data_dir DATA --warm_start_from MODEL \\
        --run_config '{"model_dir": "output", "max_steps": 900}' --hparam '{"batch_size": 32}'
    cat lines | python example/finetune_classifier.py --do_predict --bundle output/best/inference

`num_label: 1` in `--hparam` makes it a regression; `class_weights` weigh the labels: "balanced", or a number
for each. `--task NAME` reads a task of GLUE as it is downloaded, measures it by its own metrics, and writes
what GLUE's server takes to `model_dir/best/submission`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ernie.tasks import finetuning, glue
from ernie.tasks.arguments import argument_parser
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_data import ClassificationData, add_arguments
from ernie.tasks.classification_labels import class_weights
from ernie.tasks.predicting import write_predictions
from ernie.tasks.report import data_report
from ernie.tasks.thresholds import check_thresholds, tune_thresholds
from propeller import cli
from propeller.data import Dataset
from propeller.types import HParams, RunConfig

log = logging.getLogger("ernie")


def main() -> int:
    """Parses the flags and trains, or predicts."""
    parser = argument_parser(str(__doc__))
    add_arguments(parser)
    return finetuning.main(parser, train, known=("class_weights",), task=ClassificationProcessor.name)


def train(args: argparse.Namespace, run_config: RunConfig, hparams: HParams) -> None:
    """Fine-tunes, evaluates dev and test, and exports the best model by the first metric on dev."""
    config, tokenizer = finetuning.resolve_model(args, hparams)
    data = ClassificationData.of(args, tokenizer, num_label=hparams.get("num_label"))
    processor = data.processor
    if args.tune_threshold:
        check_thresholds(processor)
    weights = class_weights(
        hparams.get("class_weights"),
        processor.labels,
        data.label_counts,
        multi_label=processor.multi_label,
    )
    if weights is not None:
        hparams = hparams.join({"class_weights": weights})
    for name in data.unlabelled:
        log.info("%s has no labels and is left out", name)
    sets = {name: finetuning.prepared(name, path, processor, args) for name, path in data.labelled.items()}
    if log.isEnabledFor(logging.INFO):  # it reads all data, and of several ranks only the first tells
        log.info("data:\n%s", data_report(sets, texts=data.texts(), processor=processor))

    from ernie.tasks.classification_model import ClassificationModel

    bundle = finetuning.fit(
        ClassificationModel, args, run_config, hparams, config=config, processor=processor, sets=sets
    )
    if bundle is not None:
        finish(args, data, bundle, sets={name: sets[name] for name in sets if name != "train"})


def finish(
    args: argparse.Namespace, data: ClassificationData, bundle: Path, sets: dict[str, Dataset]
) -> None:
    """Tunes thresholds and writes predictions of dev, where asked for, and what GLUE's server takes.

    Args:
        args: the flags.
        data: the data.
        bundle: the exported model.
        sets: prepared examples of the sets that were evaluated.
    """
    from propeller.paddle import stream
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import paddle

    device = paddle.get_device()  # where the training ran
    if args.tune_threshold:
        tune_thresholds(bundle, Predictor(bundle, device=device), sets)
    if args.dev_predictions:
        write_predictions(args.dev_predictions, bundle, data.raws(next(iter(sets))))
    if task := data.processor.task:
        for name in task.submissions.keys() & data.unlabelled.keys():
            predictor = Predictor(bundle, device=device)
            answers = stream.answer_stream(predictor, predictor.bundle.processor(), data.raws(name))
            glue.write_submission(bundle.parent / "submission" / task.submissions[name], task, answers)


if __name__ == "__main__":
    cli.run(main)
