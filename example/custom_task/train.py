"""Trains the task of `agreement.py`, with all flags of the scripts beside this folder.

    pip install ./example/custom_task
    python example/custom_task/train.py --data_dir example/custom_task/shares --warm_start_from MODEL \\
        --run_config '{"model_dir": "output/agreement", "max_steps": 900}'
    ernie predict output/agreement/best/inference < lines

The folder holds `train.tsv` and `dev.tsv`, rows of `text<TAB>share`, a share between 0 and 1.
"""

from __future__ import annotations

import argparse

from agreement import AgreementProcessor

from ernie.tasks.arguments import DataFiles, argument_parser
from ernie.tasks.finetuning import fit, main, prepared, resolve_model
from propeller import cli
from propeller.types import HParams, RunConfig


def train(args: argparse.Namespace, run_config: RunConfig, hparams: HParams) -> None:
    """Trains, evaluates dev, and exports the best model."""
    config, tokenizer = resolve_model(args, hparams)
    processor = AgreementProcessor(tokenizer, max_seqlen=args.max_seqlen)
    sets = {name: prepared(name, path, processor, args) for name, path in DataFiles.of(args).items()}

    from agreement_model import AgreementModel  # Paddle comes with it

    fit(AgreementModel, args, run_config, hparams, config=config, processor=processor, sets=sets)


if __name__ == "__main__":
    cli.run(lambda: main(argument_parser(str(__doc__)), train))
