"""Fine-tunes ERNIE/BERT to rank candidates (titles, answers, passages) for queries; scores standard input.

    python example/finetune_ranker.py --data_dir DATA --warm_start_from MODEL --max_seqlen 128 \\
        --run_config '{"model_dir": "output", "max_steps": 900}' \\
        --hparam '{"loss": "pairwise", "batch_size": 8}'
    cat lines | python example/finetune_ranker.py --do_predict --bundle output/best/inference

Rows are query, candidate and label, with a qid or grouped by query. `loss` is pointwise (`batch_size` counts
rows), pairwise or listwise (it counts queries, each with its candidates, `group_size` of them at most).
"""

from __future__ import annotations

import argparse
import itertools
import logging

from ernie.tasks import finetuning
from ernie.tasks.arguments import DataFiles, argument_parser, column_names
from ernie.tasks.groups import Groups, group_size, refuse_token_batches
from ernie.tasks.predicting import write_predictions
from ernie.tasks.ranking import RankingLoss, RankingProcessor, differ, ranking_report
from ernie.tasks.ranking_files import has_labels
from propeller import cli
from propeller.data import source_files
from propeller.types import HParams, RunConfig

log = logging.getLogger("ernie")

COLUMNS = ("input_ids", "token_type_ids", "label")


def main() -> int:
    """Parses the flags and trains, or predicts."""
    known = [*RankingLoss.keys(), "group_size", "skip_unanswered"]
    return finetuning.main(argument_parser(str(__doc__)), train, known=known, task=RankingProcessor.name)


def train(args: argparse.Namespace, run_config: RunConfig, hparams: HParams) -> None:
    """Fine-tunes, evaluates dev and test, and exports the best model by MRR on dev."""
    loss, size = RankingLoss.of(hparams).loss, group_size(hparams)
    files = DataFiles.of(args)
    config, tokenizer = finetuning.resolve_model(args, hparams)
    processor = RankingProcessor(
        tokenizer,
        max_seqlen=args.max_seqlen,
        loss=loss,
        skip_unanswered=hparams.get("skip_unanswered", False),
    )
    found = dict(files.items())
    if files.test is not None and not all(
        has_labels(part, columns=column_names(args)) for part in source_files("test", data_dir=files.test)
    ):
        log.info("test has no labels and is left out")
        del found["test"]
    sets = {name: finetuning.prepared(name, path, processor, args) for name, path in found.items()}
    groups = {name: Groups(name, rows, distinct="query") for name, rows in sets.items()}
    log.info("data:\n%s", ranking_report(groups))
    evaluated = None
    if loss != "pointwise":
        refuse_token_batches(hparams)
        pad_values = processor.pad_values
        evaluated = {
            name: whole.evaluation(finetuning.batch_size(hparams), pad_values=pad_values)
            for name, whole in groups.items()
            if name != "train"
        }
        sets["train"] = groups["train"].training(COLUMNS, pad_values=pad_values, teaches=differ, size=size)

    from ernie.tasks.ranking_model import RankingModel

    bundle = finetuning.fit(
        RankingModel, args, run_config, hparams,
        config=config, processor=processor, sets=sets, evaluated=evaluated,
    )  # fmt: skip
    if args.dev_predictions and bundle is not None:
        parts = source_files("dev", data_dir=files.dev)
        raws = (processor.read(part, columns=column_names(args)) for part in parts)
        write_predictions(args.dev_predictions, bundle, itertools.chain.from_iterable(raws))


if __name__ == "__main__":
    cli.run(main)
