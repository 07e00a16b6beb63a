"""The command `ernie`.

    ernie predict BUNDLE < lines > answers
    ernie evaluate BUNDLE --data dev.tsv
    ernie tune --output_dir DIR --learning_rate 2e-5,5e-5 -- python example/finetune_classifier.py ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ernie.commands import evaluate, predict, tune
from propeller import cli
from propeller.errors import NEAR_MISS, did_you_mean
from propeller.version import __version__


class _Command(argparse.ArgumentParser):
    """The parser of one command: what it does not know is its own error, with its own usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        for flag in (word.partition("=")[0] for word in unknown if word.startswith("-")):
            near = did_you_mean(flag, self._option_string_actions, NEAR_MISS)
            more = f" {self.epilog}" if self.epilog else ""
            self.error(f"there is no flag {flag}.{near}{more}")
        if unknown:
            self.error(f"more arguments than there should be: {' '.join(unknown)}")
        return known, unknown


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    cli.run(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser("ernie", description="Uses exported models, and finds good settings.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", parser_class=_Command
    )
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
