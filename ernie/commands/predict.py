"""Answers the lines of standard input by an exported model, one line for each, in order.

    ernie predict output/best/inference < lines.txt > answers.tsv

What a line holds is the task's: a text, or text_a<TAB>text_b; for sequence labelling units joined by \\x02 or
by spaces, each of which parts two units, even where one of them is empty: so there are as many tags as units;
for reading comprehension question<TAB>context, or a JSON object.
"""

from __future__ import annotations

import argparse

from ernie.tasks.predicting import predict_stdin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this command."""
    parser.add_argument("bundle", metavar="BUNDLE", help="exported model, such as output/best/inference")
    parser.add_argument("--format", choices=("tsv", "jsonl"), default="tsv", help="form of an output line")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a line was not answered")
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where and how a model is run."""
    parser.add_argument("--device", help="any that Paddle knows; default: a GPU where there is one")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 (CPU)")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    return predict_stdin(
        args.bundle, device=args.device, bf16=args.bf16, form=args.format, strict=args.strict
    )
