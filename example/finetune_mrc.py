"""Fine-tunes ERNIE/BERT for reading comprehension (SQuAD, CMRC2018, DRCD, DuReader), and answers questions.

    python example/finetune_mrc.py --train_set train-v2.0.json --dev_set dev-v2.0.json \\
        --warm_start_from MODEL --run_config '{"model_dir": "output"}' \\
        --hparam '{"batch_size": 12, "num_epochs": 2}'
    python example/finetune_mrc.py --do_predict --bundle output/best/inference \\
        --predict_file test.json --output_dir predictions
    cat lines | python example/finetune_mrc.py --do_predict --bundle output/best/inference

A line is `question<TAB>context`, or a JSON object with these two. The predictions for dev lie in
`model_dir/best/` at the end of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ernie.tasks import finetuning, predicting
from ernie.tasks.arguments import DataFiles, argument_parser, column_names
from ernie.tasks.mrc import SCORES, MrcProcessor, best_texts, is_chinese, is_labelled, is_trainable
from ernie.tasks.mrc_files import read_mrc
from ernie.tasks.mrc_predictions import answer_questions, write_predictions
from ernie.tasks.mrc_scores import find_null_threshold
from ernie.tasks.mrc_spans import SpanSearch
from propeller import cli
from propeller.bundle import Bundle, read_bundle
from propeller.config import parse_runconfig
from propeller.data import Dataset
from propeller.data.cache import source_files
from propeller.errors import ConfigError, DataError
from propeller.processor import Raw
from propeller.types import HParams, RunConfig

log = logging.getLogger("ernie")

SEARCH_KEYS = ("n_best_size", "max_answer_length", "null_score_diff_threshold")
# By the length of an answer in tokens: 30 holds those of SQuAD; of CMRC2018's a fifth is longer.
MAX_ANSWER_LENGTH = {"squad": 30, "cmrc": 100}


def main() -> int:
    """Parses the flags and trains, or predicts."""
    parser = argument_parser(str(__doc__))
    parser.set_defaults(max_seqlen=384)
    group = parser.add_argument_group("reading comprehension")
    group.add_argument("--doc_stride", type=int, default=128, help="tokens from one window to the next")
    group.add_argument("--max_query_length", type=int, default=64, help="tokens a question is cut to")
    group.add_argument("--n_best_size", type=int, help="answers that are kept; default: 20")
    group.add_argument("--max_answer_length", type=int, help="tokens; default: 30, with the score cmrc 100")
    group.add_argument("--null_score_diff_threshold", type=float, help="no answer beyond this; default: 0")
    group.add_argument("--score", choices=SCORES, help="default: cmrc for Chinese texts, else squad")
    group.add_argument("--predict_file", metavar="FILE", help="questions for --do_predict, as --train_set")
    group.add_argument("--output_dir", metavar="DIR", help="where the predictions for --predict_file go")
    args = parser.parse_args()
    if not args.do_predict:
        for name in ("predict_file", "output_dir"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name} is for prediction: add --do_predict, or leave it out.")
        return finetuning.main(parser, train)
    if args.predict_file is None:
        given = [name for name in (*SEARCH_KEYS, "score", "output_dir") if getattr(args, name) is not None]
        if given:
            raise ConfigError(f"--{', --'.join(given)} with --do_predict: these need --predict_file, too.")
        return finetuning.main(parser, train)
    if args.output_dir is None:
        raise ConfigError("--predict_file needs --output_dir, the folder for the predictions.")
    check_writable(Path(args.output_dir))
    cli.setup_logging()
    predict(args, parse_runconfig(args))
    return 0


def train(args: argparse.Namespace, run_config: RunConfig, hparams: HParams) -> None:
    """Fine-tunes, evaluates dev and test, exports the best model, and writes its predictions for dev."""
    files = DataFiles.of(args)
    config, tokenizer = finetuning.resolve_model(args, hparams)
    questions = list(read(files.train))
    score = args.score or ("cmrc" if is_chinese(questions) else "squad")
    processor = MrcProcessor(
        tokenizer,
        max_seqlen=args.max_seqlen,
        doc_stride=args.doc_stride,
        max_query_length=args.max_query_length,
        search=SpanSearch(
            **{
                "max_answer_length": MAX_ANSWER_LENGTH[score],
                "with_negative": any(raw["is_impossible"] for raw in questions),
                **given_search(args),
            }
        ),
        score=score,
    )
    log.info("answers: %s, scored as by %s", processor.search, score)
    found = usable(files, questions)
    del questions  # many, and training takes long
    sets = {name: prepared(name, path, processor, args) for name, path in found.items()}
    log.info("windows: %s", ", ".join(f"{name} {len(windows)}" for name, windows in sets.items()))

    from ernie.tasks.mrc_model import MrcModel

    folder = finetuning.fit(
        MrcModel, args, run_config, hparams, config=config, processor=processor, sets=sets
    )
    if folder is not None:
        answer(read_bundle(folder), processor, read(files.dev), folder.parent, device=run_config.device)
        if args.dev_predictions:
            predicting.write_predictions(args.dev_predictions, folder, read(files.dev))


def usable(files: DataFiles, train_questions: Iterable[Raw]) -> dict[str, Path]:
    """The sets that have a loss; `test` may have none.

    Raises:
        DataError: there is nothing to train on, or to choose the best model by.
    """
    found = {}
    for name, path in files.items():
        if sum(map(is_trainable, train_questions if name == "train" else read(path))):
            found[name] = path
        elif name == "test":
            log.info("test has no answers with a place in its texts and is left out")
        else:
            raise DataError(
                f"none of its questions has an answer with a place in its text, or is marked as impossible; "
                f"{name} needs some that are",
                path=path,
            )
    return found


def prepared(name: str, path: Path, processor: MrcProcessor, args: argparse.Namespace) -> Dataset:
    """The windows of a file through the cache; for training without questions whose answer has no place."""
    if name != "train":
        return finetuning.prepared(name, path, processor, args)
    return finetuning.prepared(
        name,
        path,
        processor,
        args,
        read=lambda part: processor.read(part, columns=column_names(args)).filter(is_trainable),
        read_key="trainable",
    )


def predict(args: argparse.Namespace, run_config: RunConfig) -> None:
    """Answers the questions of a file by the exported model."""
    bundle = read_bundle(args.bundle or Path(run_config.model_dir) / "best" / "inference")
    exported = bundle.processor()
    if not isinstance(exported, MrcProcessor):
        raise ConfigError(
            f"{bundle.folder} is a model for {exported.name}: expected one for {MrcProcessor.name}."
        )
    changes = {
        "search": dataclasses.replace(exported.search, **given_search(args)),
        "score": args.score or exported.score,
    }
    processor = MrcProcessor(exported.tokenizer, **{**exported.settings, **changes})
    raws, folder = read(Path(args.predict_file)), Path(args.output_dir)
    answer(bundle, processor, raws, folder, device=run_config.device, bf16=args.bf16)


def check_writable(folder: Path) -> None:
    """Makes a folder for predictions, before any time is spent on them.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output_dir {folder} cannot be written to.")


def answer(
    bundle: Bundle,
    processor: MrcProcessor,
    raws: Iterable[Raw],
    folder: Path,
    *,
    device: str | None,
    bf16: bool = False,
) -> None:
    """Writes the predictions of an exported model to a folder, and logs what they score."""
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import set_device

    predictor = Predictor(bundle, device=set_device(device), bf16=bf16)
    questions = list(raws)
    answers = answer_questions(predictor, processor, questions)
    write_predictions(folder, questions, answers)
    if not any(map(is_labelled, questions)):
        return
    scores = processor.scores(questions, answers)
    log.info("these score %s", ", ".join(f"{name}: {value:.2f}" for name, value in scores.items()))
    if processor.search.with_negative and processor.score == "squad":
        labelled = [row for row in zip(questions, answers, strict=True) if is_labelled(row[0])]
        threshold, f1 = find_null_threshold(
            [raw for raw, _ in labelled], *best_texts(*map(list, zip(*labelled, strict=True)))
        )
        log.info(
            "the best f1, %.2f, comes with --null_score_diff_threshold %s beside --predict_file; it was %s",
            f1,
            threshold,
            processor.search.null_score_diff_threshold,
        )


def read(path: Path) -> Iterator[Raw]:
    """The questions of a file, or of all parts of a folder.

    Raises:
        DataError: as `read_mrc`, or a question id stands in two parts.
    """
    places: dict[str, Path] = {}
    for part in source_files(path.name, data_dir=path):
        for raw in read_mrc(part):
            if places.setdefault(raw["id"], part) != part:
                raise DataError(
                    f"the question id {raw['id']!r} stands in {places[raw['id']]}, too; expected each once",
                    path=part,
                )
            yield raw


def given_search(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of how answers are chosen."""
    values = {name: getattr(args, name) for name in SEARCH_KEYS}
    return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    cli.run(main)
