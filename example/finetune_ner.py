"""Fine-tunes ERNIE/BERT for sequence labelling (NER), and labels the lines of standard input.

    python example/finetune_ner.py --data_dir DATA --warm_start_from MODEL \\
        --run_config '{"model_dir": "output", "max_steps": 900}' --hparam '{"batch_size": 16}'
    cat lines | python example/finetune_ner.py --do_predict --bundle output/best/inference

Data files are as MSRA's (`text_a<TAB>label`, units and tags joined by \\x02 or by spaces), CoNLL's, or JSON
(`{"tokens": [...], "ner_tags": [...]}`). A line of standard input is units joined by \\x02 or by spaces, and
gets a line of tags, joined alike; with `--format jsonl` the entities as well. `use_crf: true` in `--hparam`
puts a CRF on top.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ernie.crf import CrfSettings
from ernie.tasks import finetuning
from ernie.tasks.arguments import DataFiles, argument_parser, column_names
from ernie.tasks.entity_scores import MODES
from ernie.tasks.ner_files import FORMATS, find_tags, has_labels, read_ner
from ernie.tasks.predicting import write_predictions
from ernie.tasks.sentence_pieces import over_sentence_pieces
from ernie.tasks.sequence_labeling import SequenceLabelingProcessor
from ernie.tasks.tagging import SCHEMES
from propeller import cli
from propeller.config import ArgumentParser
from propeller.data import source_files
from propeller.types import HParams, RunConfig

log = logging.getLogger("ernie")


def main() -> int:
    """Parses the flags and trains, or predicts."""
    parser = argument_parser(str(__doc__))
    add_flags(parser)
    return finetuning.main(
        parser, train, known=CrfSettings.keys(), task=SequenceLabelingProcessor.name
    )


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this task."""
    flags = parser.add_argument_group("sequence labelling")
    flags.add_argument("--data_format", choices=FORMATS, help="form of the data files; default: recognised")
    flags.add_argument("--scheme", help=f"of the tags: {', '.join(SCHEMES)}; default: recognised")
    flags.add_argument("--score", choices=MODES, default="default", help="how entities are counted")
    flags.add_argument(
        "--doc_stride",
        type=int,
        help="tokens from one window of a long text to the next; default: 3/4 of a window",
    )
    flags.add_argument(
        "--use_sentence_piece_vocab",
        nargs="?",
        const="true",
        default="false",
        type=str.lower,
        choices=("true", "1", "false", "0"),
        help="the vocabulary is SentencePiece's, as ERNIE-tiny's; units are looked up in it",
    )


def train(args: argparse.Namespace, run_config: RunConfig, hparams: HParams) -> None:
    """Fine-tunes, evaluates dev and test, and exports the best model by F1 on dev."""
    CrfSettings.of(hparams)  # what cannot be used is refused before any data is read
    files = DataFiles.of(args)
    config, tokenizer = finetuning.resolve_model(args, hparams)
    if args.use_sentence_piece_vocab in ("true", "1"):
        tokenizer = over_sentence_pieces(tokenizer)
    form = {"columns": column_names(args), "format": args.data_format}
    tags = find_tags(files.train, scheme=args.scheme, **form)
    log.info("labels (%s): %s", tags.scheme, ", ".join(tags.labels))
    processor = SequenceLabelingProcessor(
        tokenizer,
        tags.labels,
        max_seqlen=args.max_seqlen,
        scheme=tags.scheme,
        doc_stride=args.doc_stride,
        by_character=tags.by_character,
        score=args.score,
    )
    read = functools.partial(read_ner, scheme=tags.scheme, labels=tags.labels, **form)
    found = dict(files.items())
    if files.test is not None and not any(
        has_labels(part, columns=form["columns"]) for part in source_files("test", data_dir=files.test)
    ):
        log.info("test has no labels and is left out")
        del found["test"]
    sets = {
        name: finetuning.prepared(name, path, processor, args, read=read, read_key=args.data_format)
        for name, path in found.items()
    }
    if log.isEnabledFor(logging.INFO):  # it reads all data, and of several ranks only the first tells
        for name, dataset in sets.items():
            log.info("%s: %s", name, report(dataset, processor))

    from ernie.tasks.sequence_labeling_model import SequenceLabelingModel

    bundle = finetuning.fit(
        SequenceLabelingModel, args, run_config, hparams, config=config, processor=processor, sets=sets
    )
    if args.dev_predictions and bundle is not None:
        raws = itertools.chain.from_iterable(map(read, source_files("dev", data_dir=files.dev)))
        write_predictions(args.dev_predictions, bundle, raws)


def report(examples: Iterable[Mapping[str, Any]], processor: SequenceLabelingProcessor) -> str:
    """What a set holds: texts, windows, unknown tokens, labels."""
    texts = windows = tokens = unknown = 0
    counts = np.zeros(len(processor.labels), dtype=np.int64)
    for example in examples:
        texts += example["window"] == 0
        windows += 1
        tokens += len(example["input_ids"])
        unknown += np.count_nonzero(example["input_ids"] == processor.tokenizer.unk_token_id)
        counts += np.bincount(example["label"][example["units"] >= 0], minlength=len(counts))
    labels = ", ".join(f"{label} {count}" for label, count in zip(processor.labels, counts, strict=True))
    return (
        f"{texts} texts in {windows} windows of up to {processor.max_seqlen} tokens; "
        f"unknown tokens: {unknown / tokens:.2%}; labels: {labels}"
    )


if __name__ == "__main__":
    cli.run(main)
