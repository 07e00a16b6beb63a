"""Flags, JSON files and the environment -> `RunConfig` and `HParams`.

A configuration is a JSON object, a path to one, or the literal style of the older ERNIE scripts:
a Python dictionary with `#` comments, `None` and single quotes. It is parsed, never executed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from propeller.errors import ConfigError
from propeller.types import HParams, RunConfig

RUN_CONFIG_ENV = "PROPELLER_RUNCONFIG"
HPARAMS_ENV = "PROPELLER_HPARAMS"

# Flags that switch on the key of the run configuration that is called as they are.
_SWITCHES = {
    "profile": "write where the time goes to model_dir/profile",
    "check_numerics": "name the operation that makes the first NaN; slow",
}


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with the flags of every training.

    `--run_config` and `--hparam` can be repeated, the later wins.

    A wrong flag raises `ConfigError` instead of ending the process.
    """

    def __init__(self, description: str | None = None, **options: Any):
        options.setdefault("allow_abbrev", False)
        super().__init__(description=description, **options)
        self.add_argument(
            "--run_config",
            action="append",
            default=[],
            metavar="JSON|FILE",
            help=f"run configuration, as JSON, a literal or a file; also {RUN_CONFIG_ENV}",
        )
        self.add_argument(
            "--hparam",
            action="append",
            default=[],
            metavar="JSON|FILE",
            help=f"hyper-parameters, as JSON, a literal or a file; also {HPARAMS_ENV}",
        )
        self.add_argument(
            "--restart", action="store_true", help="begin anew; the old model_dir is kept aside"
        )
        self.add_argument("--nproc", metavar="auto|N", help="train as several processes, one a card or core")
        for name, what in _SWITCHES.items():
            self.add_argument(f"--{name}", action="store_true", help=what)

    def error(self, message: str) -> NoReturn:
        """Raises `ConfigError` with argparse's message and the usage line."""
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


class _JsonNames(ast.NodeTransformer):
    """Reads JSON's `true`, `false` and `null` in a literal, since people mix the two styles."""

    _names = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self._names:
            return ast.copy_location(ast.Constant(self._names[node.id]), node)
        return node


def parse_config(text: str, *, what: str = "configuration") -> dict[str, Any]:
    """Parses one configuration.

    Args:
        text: a JSON object, a literal dictionary, or the path of a file that holds either.
        what: how an error calls it.

    Returns:
        The dictionary.

    Raises:
        ConfigError: it is neither, or the file cannot be read.
    """
    source = what
    if not text.strip().startswith("{"):
        path = Path(text.strip())
        source = f"{what} file {path}"
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{what} {text.strip()!r} is neither a JSON object or literal dictionary in braces "
                f"nor a readable file ({error})."
            ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as json_error:
        try:
            tree = _JsonNames().visit(ast.parse(text.strip(), mode="eval"))
            value = ast.literal_eval(tree)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
            raise ConfigError(
                f"{source} is neither JSON ({json_error}) nor a literal dictionary ({error}): "
                f"{_shortened(text)}"
            ) from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{source} must be an object with string keys, got {_shortened(text)}")
    return value


def _shortened(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " ..."


def _joined(flags: Sequence[str], environment: str, what: str) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for text in [os.environ.get(environment, ""), *flags]:
        if text.strip():
            joined.update(parse_config(text, what=what))
    return joined


def parse_runconfig(args: argparse.Namespace) -> RunConfig:
    """Resolves `--profile` and `--check_numerics` over `--run_config` over `PROPELLER_RUNCONFIG`.

    Raises:
        ConfigError: text that cannot be parsed, an unknown key or a wrong value.
    """
    values = _joined(args.run_config, RUN_CONFIG_ENV, "--run_config")
    # A parser of the user's own may lack them.
    values.update({name: True for name in _SWITCHES if getattr(args, name, False)})
    return RunConfig.from_dict(values)


def parse_hparam(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> HParams:
    """Resolves `--hparam` over the environment's `PROPELLER_HPARAMS` over `defaults`.

    Raises:
        ConfigError: text that cannot be parsed.
    """
    return HParams(defaults).join(_joined(args.hparam, HPARAMS_ENV, "--hparam"))
