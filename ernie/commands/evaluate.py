"""Evaluates an exported model on a labelled file, by the metrics of its training.

    ernie evaluate output/best/inference --data dev.tsv

Writes one JSON object to standard output. A retriever, or any bundle of embeddings, is judged by how queries
find their passages, in files such as it is trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ernie.commands.predict import add_device_arguments
from ernie.tasks.arguments import add_columns_argument, column_names
from ernie.tasks.ner_files import FORMATS
from propeller import atomic
from propeller.bundle import read_bundle
from propeller.errors import ConfigError

_SETS = ("train", "dev", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    parser.add_argument("bundle", metavar="BUNDLE", help="exported model, such as output/best/inference")
    parser.add_argument("--data", metavar="FILE", required=True, help="labelled file, or folder of parts")
    add_columns_argument(parser)
    parser.add_argument("--data_format", choices=FORMATS, help="of tagged units; default: recognised")
    parser.add_argument(
        "--candidates", metavar="all|given", help="what embeddings rank for a query; default: all passages"
    )
    add_device_arguments(parser)


def _check_data(path: Path) -> None:
    """Refuses a folder of several sets.

    Raises:
        ConfigError: it is one.
    """
    names = sorted(child.name for child in path.iterdir()) if path.is_dir() else []
    sets = [name for name in names if name.split(".")[0] in _SETS]
    if sets and path.name not in {name.split(".")[0] for name in sets}:
        raise ConfigError(f"--data {path} is a folder of sets; name one of these in it: {', '.join(sets)}.")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    _check_data(Path(args.data))
    bundle = read_bundle(args.bundle)
    processor = bundle.processor()
    from ernie.tasks.evaluating import evaluate_bundle
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import set_device

    predictor = Predictor(bundle, device=set_device(args.device), bf16=args.bf16)
    results = evaluate_bundle(
        predictor,
        processor,
        Path(args.data),
        columns=column_names(args),
        data_format=args.data_format,
        candidates=args.candidates,
    )
    print(atomic.to_json(results))
    return 0
