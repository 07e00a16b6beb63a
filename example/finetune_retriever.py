"""Trains a dual encoder: embeddings by which queries find their passages, for the encoder server.

    python example/finetune_retriever.py --train_set pairs.tsv --dev_set dev.tsv --warm_start_from MODEL \\
        --run_config '{"model_dir": "output", "max_steps": 900}' --hparam '{"batch_size": 64}'
    python -m ernie.service.encoder_server -m output/best/inference

A row is a query, a right passage and, if you like, a wrong one; or query, passage and label, with a qid or
grouped by query. The other passages of a batch are wrong ones, too. `batch_size` counts queries.
"""

from __future__ import annotations

import argparse
import logging

from ernie.tasks import finetuning
from ernie.tasks.arguments import DataFiles, argument_parser, column_names
from ernie.tasks.dual_encoder import (
    ENCODER_KEYS,
    DualEncoderProcessor,
    RetrievalLoss,
    embedding_settings,
    is_answered,
    retrieval_report,
)
from ernie.tasks.groups import Groups, group_size, refuse_token_batches
from ernie.tasks.ranking_files import lacks_labels
from propeller import cli
from propeller.data import source_files
from propeller.errors import ConfigError
from propeller.types import HParams, RunConfig

log = logging.getLogger("ernie")

COLUMNS = ("input_ids", "token_type_ids", "label", "query", "text")


def main() -> int:
    """Parses the flags and trains, or predicts."""
    known = [*RetrievalLoss.keys(), *ENCODER_KEYS, "group_size", "candidates"]
    return finetuning.main(argument_parser(str(__doc__)), train, known=known)


def train(args: argparse.Namespace, run_config: RunConfig, hparams: HParams) -> None:
    """Trains, evaluates dev and test, and exports the best encoder by MRR on dev."""
    RetrievalLoss.of(hparams)
    size = group_size(hparams)
    refuse_token_batches(hparams)
    if args.dev_predictions:
        raise ConfigError(
            "--dev_predictions: an encoder answers by vectors; encode the texts with the bundle."
        )
    config, tokenizer = finetuning.resolve_model(args, hparams)
    embedding = embedding_settings(args.warm_start_from, config, hparams, max_seqlen=args.max_seqlen)
    processor = DualEncoderProcessor(tokenizer, embedding, candidates=hparams.get("candidates", "all"))
    files = DataFiles.of(args)
    found = dict(files.items())
    if files.test is not None and any(
        lacks_labels(part, columns=column_names(args)) for part in source_files("test", data_dir=files.test)
    ):
        log.info("test has no labels and is left out")
        del found["test"]
    sets = {name: finetuning.prepared(name, path, processor, args) for name, path in found.items()}
    groups = {name: Groups(name, rows) for name, rows in sets.items()}
    log.info("data:\n%s", retrieval_report(groups))
    log.info("embeddings: %s", embedding)
    pad_values = processor.pad_values
    evaluated = {
        name: whole.evaluation(finetuning.batch_size(hparams), pad_values=pad_values, lead=1)
        for name, whole in groups.items()
        if name != "train"
    }
    sets["train"] = groups["train"].training(
        COLUMNS, pad_values=pad_values, teaches=is_answered, size=size, lead=1
    )

    from ernie.tasks.dual_encoder_model import DualEncoderModel

    finetuning.fit(
        DualEncoderModel, args, run_config, hparams,
        config=config, processor=processor, sets=sets, evaluated=evaluated,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
