"""Fine-tunes ERNIE/BERT for reading comprehension (SQuAD, CMRC2018, DRCD, DuReader), and answers questions.

    python example/finetune_mrc.py --train_set train-v2.0.json --dev_set dev-v2.0.json \\
        --warm_start_from MODEL --run_config '{"model_dir": "output"}' \\
        --hparam '{"batch_size": 12, "num_epochs": 2}'
    python example/finetune_mrc.py --do_predict --bundle output/best/inference \\
        --predict_file test.json --output_dir predictions
    cat lines | python example/finetune_mrc.py --do_predict --bundle output/best/inference

A line is `question<TAB>context`, or a JSON object with these two. The predictions for dev lie in
`model_dir/best/` at the end of training. Where questions may have no answer, as in SQuAD 2.0, the model is
chosen by the f1 that the best threshold gives on dev, and its bundle answers by that threshold.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie.tasks import finetuning, predicting
from ernie.tasks.arguments import DataFiles, argument_parser, column_names
from ernie.tasks.mrc import SCORES, MrcProcessor, is_chinese, is_labelled, is_trainable
from ernie.tasks.mrc_files import read_mrc
from ernie.tasks.mrc_predictions import answer_questions, write_predictions
from ernie.tasks.mrc_spans import SpanSearch
from ernie.tasks.mrc_threshold import Answered, tune_null_threshold
from propeller import cli
from propeller.bundle import Bundle, read_bundle
from propeller.config import parse_runconfig
from propeller.data import Dataset, source_files
from propeller.errors import ConfigError, DataError
from propeller.processor import Answer, Raw
from propeller.types import HParams, RunConfig

if TYPE_CHECKING:
    from propeller.paddle.inference import Predictor

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
    group.add_argument(
        "--null_score_diff_threshold", type=float, help="no answer beyond this; default: the best on dev"
    )
    group.add_argument("--score", choices=SCORES, help="default: cmrc for Chinese texts, else squad")
    group.add_argument("--predict_file", metavar="FILE", help="questions for --do_predict, as --train_set")
    group.add_argument("--output_dir", metavar="DIR", help="where the predictions for --predict_file go")
    args = parser.parse_args()
    if not args.do_predict:
        for name in ("predict_file", "output_dir"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name} is for prediction: add --do_predict, or leave it out.")
        return finetuning.main(parser, train, task=MrcProcessor.name)
    if args.predict_file is None:
        given = [name for name in (*SEARCH_KEYS, "score", "output_dir") if getattr(args, name) is not None]
        if given:
            raise ConfigError(f"--{', --'.join(given)} with --do_predict: these need --predict_file, too.")
        return finetuning.main(parser, train, task=MrcProcessor.name)
    if args.output_dir is None:
        raise ConfigError("--predict_file needs --output_dir, the folder for the predictions.")
    check_writable(Path(args.output_dir))
    cli.setup_logging(args.verbose)
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
        finish(folder, processor, found, device=run_config.device)
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


def finish(bundle: Path, processor: MrcProcessor, files: Mapping[str, Path], *, device: str | None) -> None:
    """Tunes the threshold of the exported model, unless one was given, and writes its predictions for dev."""
    names = ("dev", "test") if processor.seeks_null_threshold else ("dev",)
    predictor = load(read_bundle(bundle), device)
    sets = {name: answered(predictor, processor, files[name]) for name in names if name in files}
    if processor.seeks_null_threshold:
        processor = tune_null_threshold(bundle, sets)
    for name, (raws, answers) in sets.items():
        log_scores(name, processor, raws, answers)
    raws, answers = sets["dev"]
    write_predictions(bundle.parent, raws, list(map(processor.search.choose, answers)))


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
    predictor = load(bundle, run_config.device, bf16=args.bf16)
    raws, answers = answered(predictor, processor, Path(args.predict_file))
    write_predictions(Path(args.output_dir), raws, answers)
    log_scores(args.predict_file, processor, raws, answers)


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


def load(bundle: Bundle, device: str | None, *, bf16: bool = False) -> Predictor:
    """The model of a bundle."""
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import set_device

    return Predictor(bundle, device=set_device(device), bf16=bf16)


def answered(predictor: Predictor, processor: MrcProcessor, path: Path) -> Answered:
    """The questions of a file, and the answers to them."""
    raws = list(read(path))
    return raws, answer_questions(predictor, processor, raws)


def log_scores(name: str, processor: MrcProcessor, raws: Sequence[Raw], answers: Sequence[Answer]) -> None:
    """Logs what the answers to a set score, if somebody knows."""
    if any(map(is_labelled, raws)):
        scores = processor.scores(raws, answers).items()
        shown = ", ".join(f"{score}: {value:.2f}" for score, value in scores)
        log.info("the answers to %s score %s", name, shown)


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
