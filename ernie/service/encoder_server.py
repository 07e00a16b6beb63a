"""Serves embeddings of an ERNIE or BERT encoder.

    python ernie/service/encoder_server.py -m MODEL_OR_BUNDLE -p 8888 -v --encode_layer pooler
    ernie-encoder-server -m MODEL --pooling mean --normalize --http-port 8080

MODEL is a pretrained folder, the project's own or a Hugging Face one as it is, with sentence-transformers'
files if it has them; it is exported once and kept in the cache. Clients: `ernie.service.client`, or, with
--http-port, any that speaks OpenAI's embeddings API.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    # Run by its path, Python looks for modules in this folder first, where some are called like its own. What
    # it is to find are the packages of this clone.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(sys.path[0])))

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ernie.service import export, http_server
from propeller import cli
from propeller.errors import ConfigError
from propeller.tools import start_server

# What a model is called that is given without a name.
_MODEL_NAME = "encoder"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and ends the process."""
    cli.run(lambda: _main(argv))
    raise AssertionError("cli.run ends the process")


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    # A folder may have `=` in its path, but before the first slash it ends a name.
    named = [text if "=" in text.partition("/")[0] else f"{_MODEL_NAME}={text}" for text in args.model]
    sources = start_server.models_from(named)
    settings = start_server.settings_from(args, sources)  # what is wrong with a flag shows before the export
    companion = _http_command(args)
    cli.setup_logging(args.verbose)
    options = export.options_from(args)
    bundles = {
        name: export.encoder_bundle(source, options, args.cache_dir) for name, source in sources.items()
    }
    if not companion:
        return start_server.start(args, bundles)
    from propeller.service.server import serve

    return serve(dataclasses.replace(settings, models=bundles), companion=companion)


def _parser() -> start_server.ServerParser:
    parser = start_server.ServerParser(__doc__, prog="ernie-encoder-server")
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]MODEL_OR_BUNDLE",
        help="a pretrained folder or a bundle; can be repeated, the first one is for clients that name none",
    )
    export.add_arguments(parser)
    http = parser.add_argument_group("HTTP", "OpenAI's embeddings API; needs ernie-propeller[http].")
    http.add_argument("--http-port", type=int, metavar="PORT", help="default: none")
    http.add_argument("--http-bind", metavar="ADDRESS", help="default 127.0.0.1")
    http.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"holds the key that clients must send; so does {http_server.KEY_VARIABLE} in the environment",
    )
    start_server.add_arguments(parser)
    return parser


def _http_command(args: argparse.Namespace) -> list[str]:
    """The command line of the HTTP front; empty if there is to be none.

    Raises:
        ConfigError: a flag of its that cannot be used.
    """
    if args.http_port is None:
        for name in ("http_bind", "api_key_file"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is of no use without --http-port.")
        return []
    if args.join is not None:
        raise ConfigError("--http-port with --join: a host that joins opens no port; give it to the server.")
    if not 0 < args.http_port < 2**16:
        raise ConfigError(f"--http-port is {args.http_port}; expected a number from 1 to 65535.")
    if args.http_port == args.port:
        raise ConfigError(f"--http-port and --port are both {args.port}; expected one port each.")
    http_server.check_installed()
    if args.api_key_file is not None:
        # By the environment, since every user of the machine can read command lines.
        os.environ[http_server.KEY_VARIABLE] = _read_key(args.api_key_file)
    host = args.http_bind or "127.0.0.1"
    http_server.check_exposure(host, insecure=args.insecure)
    http_server.check_free(host, args.http_port)
    return http_server.command(host, args.http_port, insecure=args.insecure)


def _read_key(path: Path) -> str:
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
    if not key or not key.isprintable() or not key.isascii():
        raise ConfigError(f"--api-key-file {path} must hold one line of printable ASCII characters, the key.")
    return key


if __name__ == "__main__":
    main()
