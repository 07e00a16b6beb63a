"""The command `ernie`.

    ernie predict BUNDLE < lines > answers
    ernie evaluate BUNDLE --data dev.tsv
    ernie tune --output_dir DIR --learning_rate 2e-5,5e-5 -- python example/finetune_classifier.py ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ernie.commands import evaluate, predict, tune
from propeller import cli
from propeller.version import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    cli.run(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser("ernie", description="Uses exported models, and finds good settings.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (predict, evaluate, tune):
        summary = str(module.__doc__).partition("\n")[0]
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    cli.setup_logging()
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    main()
