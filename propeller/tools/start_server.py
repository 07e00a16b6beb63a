"""Serves exported models to many clients at once.

    python -m propeller.tools.start_server -m BUNDLE -p 8888      (also: propeller-server)
    propeller-server -m first=BUNDLE -m second=BUNDLE             several models; clients choose by name
    propeller-server keys DIR [--client NAME]                     makes keys of server and clients
    propeller-server -m BUNDLE --join tcp://host:8890 --curve-keys DIR    workers for a server elsewhere

BUNDLE is what a training exported, such as model_dir/best/inference. SIGTERM lets what is in flight finish;
SIGHUP takes over a new version of the bundles, and keys that were added.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from propeller import cli
from propeller.errors import ConfigError
from propeller.launch import visible_gpus
from propeller.service.settings import ServerSettings

_DEFAULT = {field.name: field.default for field in dataclasses.fields(ServerSettings)}
_DEFAULT_MODEL = "default"
_NAMED = re.compile(r"([^/\\=]+)=(.*)", re.DOTALL)
_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})")
# What a host that joins another server has no use for.
_NOT_WITH_JOIN = (
    "port", "bind", "insecure", "metrics_port", "metrics_bind", "worker_port", "worker_bind",
    "max_queue_rows", "max_wait_ms", "max_message_bytes", "batch_timeout_s", "drain_s",
)  # fmt: skip


class ServerParser(argparse.ArgumentParser):
    """A parser whose flags are written with dashes; the underscores of older commands do as well.

    A wrong flag raises `ConfigError` instead of ending the process.
    """

    def __init__(self, description: str | None = None, **options: Any):
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse`'s, after it has put dashes into flags."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(_with_dashes, words[:end]), *words[end:]], namespace)

    def error(self, message: str) -> NoReturn:
        """Raises `ConfigError` with argparse's message and the usage line."""
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and ends the process with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    cli.run(lambda: _make_keys(words[1:]) if words[:1] == ["keys"] else _serve(words))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every server, all but the models; `start` reads them."""
    _add_network(parser)
    _add_work(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="log each step")


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "-p", "--port", type=int, default=_DEFAULT["port"], help="default %(default)s; 0: any that is free"
    )
    group.add_argument(
        "--bind",
        metavar="ADDRESS",
        default=_DEFAULT["bind"],
        help="default %(default)s; one that other machines can reach needs --curve-keys or --insecure",
    )
    group.add_argument(
        "--curve-keys", metavar="DIR", type=Path, help="keys, made by `propeller-server keys DIR`"
    )
    group.add_argument("--insecure", action="store_true", help="let in, without keys, whoever can reach it")
    group.add_argument(
        "--metrics-port", metavar="PORT", type=int, help="HTTP port of /metrics and /health; default: none"
    )
    group.add_argument(
        "--metrics-bind", metavar="ADDRESS", default=_DEFAULT["metrics_bind"], help="default %(default)s"
    )
    group.add_argument(
        "--worker-port",
        metavar="PORT",
        type=int,
        help="where other hosts may join with workers; needs --curve-keys",
    )
    group.add_argument(
        "--worker-bind", metavar="ADDRESS", default=_DEFAULT["worker_bind"], help="default %(default)s"
    )
    group.add_argument(
        "--join",
        metavar="tcp://HOST:PORT",
        help="run workers for the server whose --worker-port this is; needs --curve-keys",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument(
        "--workers",
        metavar="N",
        type=_number_or_auto,
        help="worker processes of each model, on GPUs of each card; default auto: by the cores, one a card",
    )
    group.add_argument(
        "--threads",
        metavar="N",
        type=_number_or_auto,
        help="threads of each worker; default auto: by the cores",
    )
    group.add_argument(
        "--device",
        metavar="cpu|gpu|gpu:0,1",
        default="cpu",
        help="default %(default)s; gpu: every card that CUDA_VISIBLE_DEVICES shows, numbered among these",
    )
    group.add_argument("--bf16", action="store_true", help="compute in bfloat16 (CPU): faster, less exact")
    for flag, kind, unit in (
        ("--max-batch-tokens", int, "tokens of a batch, padding included; default: by the model"),
        ("--max-batch-size", int, "rows of a batch"),
        ("--max-wait-ms", float, "wait for company while all workers are busy"),
    ):
        group.add_argument(flag, metavar="N", type=kind, **_default(flag, unit))
    group.add_argument(
        "--max-queue",
        metavar="N",
        dest="max_queue_rows",
        type=int,
        **_default("--max-queue-rows", "rows that may wait; more are refused"),
    )
    group.add_argument(
        "--max-message-mb", metavar="N", type=int, default=64, help="the largest request (%(default)s)"
    )
    for flag, unit in (
        ("--batch-timeout-s", "a worker that takes longer for a batch is replaced"),
        ("--drain-s", "time to finish what is in flight when told to end"),
        ("--warmup-s", "time to warm up a worker before it takes requests"),
    ):
        group.add_argument(flag, metavar="N", type=float, **_default(flag, unit))


def _default(flag: str, what: str) -> dict[str, Any]:
    value = _DEFAULT[flag.removeprefix("--").replace("-", "_")]
    return {"default": value, "help": what if value is None else f"{what} (%(default)s)"}


def models_from(texts: Sequence[str]) -> dict[str, Path]:
    """Reads the values of `--model`: `name=folder`, or a folder alone, which is called `default`.

    A folder with `=` in its name is written with a slash before it, such as `./lr=1e-4`.

    Raises:
        ConfigError: a name stands there twice, or a name or folder is empty.
    """
    models: dict[str, Path] = {}
    for text in texts:
        match = _NAMED.fullmatch(text)
        name, folder = match.groups() if match else (_DEFAULT_MODEL, text)
        if not folder.strip():
            raise ConfigError(f"--model is {text!r}; expected a folder, or name=folder.")
        if name in models:
            raise ConfigError(
                f"--model {text}: there is a model {name!r} already, {models[name]}. Give each one a name of "
                "its own: --model name=folder."
            )
        models[name] = Path(folder)
    return models


def devices_from(text: str) -> tuple[str, ...]:
    """Reads `--device`: `cpu`, `gpu` (every card that is visible) or `gpu:0,1`.

    Raises:
        ConfigError: it is none of these, or there is no such card.
    """
    kind, colon, numbers = text.partition(":")
    if text == "cpu":
        return ("cpu",)
    cards = numbers.split(",") if colon else []
    if kind != "gpu" or not all(card.isascii() and card.isdecimal() for card in cards):
        raise ConfigError(f"--device is {text!r}; expected cpu, gpu, or gpu: with numbers, such as gpu:0,1.")
    visible = visible_gpus()
    if not visible:
        raise ConfigError(
            f"--device is {text}, but Paddle sees no card here: paddlepaddle-gpu is not installed, there is "
            "no driver, or CUDA_VISIBLE_DEVICES hides all of them."
        )
    chosen = [int(card) for card in cards] or list(range(visible))
    if max(chosen) >= visible:
        raise ConfigError(
            f"--device is {text}, but {visible} cards are visible: expected numbers from 0 to {visible - 1}."
        )
    return tuple(f"gpu:{card}" for card in chosen)


def settings_from(args: argparse.Namespace, models: dict[str, Path]) -> ServerSettings:
    """Makes settings out of the flags of `add_arguments`.

    Args:
        args: what the parser made of the command line.
        models: bundle folders by name, the default one first.

    Raises:
        ConfigError: a value that cannot be used.
    """
    made = {
        "models": models,
        "num_workers": args.workers,
        "num_threads": args.threads,
        "devices": devices_from(args.device),
        "max_message_bytes": args.max_message_mb << 20,
    }
    same = _DEFAULT.keys() - made.keys()
    return ServerSettings(**made, **{name: getattr(args, name) for name in same})


def start(args: argparse.Namespace, models: dict[str, Path]) -> int:
    """Serves, or joins a server with workers, until it is told to end; returns the exit code.

    Args:
        args: has the flags of `add_arguments`.
        models: bundle folders by name, the default one first.

    Raises:
        PropellerError: a flag or bundle that cannot be used.
    """
    settings = settings_from(args, models)
    if args.join is not None:
        _check_join(args.join, settings)
    cli.setup_logging(settings.verbose)
    if args.join is not None:
        from propeller.service.join import join

        return join(args.join, settings)
    from propeller.service.server import serve

    return serve(settings)


def _check_join(address: str, settings: ServerSettings) -> None:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise ConfigError(f"--join is {address!r}; expected an address such as tcp://10.0.0.1:8890.")
    if settings.curve_keys is None:
        raise ConfigError(
            "--join needs --curve-keys DIR, a folder with copies of server.key and worker.key_secret from "
            "the server's folder of keys."
        )
    for name in _NOT_WITH_JOIN:
        if getattr(settings, name) != _DEFAULT[name]:
            raise ConfigError(f"{name} is of no use with --join: it is the server's. Give it there.")


def _serve(words: Sequence[str]) -> int:
    parser = ServerParser(__doc__, prog="propeller-server")
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]BUNDLE",
        help="a model to serve; can be repeated, the first one is for clients that name none",
    )
    add_arguments(parser)
    args = parser.parse_args(words)
    return start(args, models_from(args.model))


def _make_keys(words: Sequence[str]) -> int:
    parser = ServerParser(
        "Makes the keys of a server and of those who may connect to it.", prog="propeller-server keys"
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the server's folder of keys")
    parser.add_argument("--client", metavar="NAME", help="add a key of its own for one more client")
    args = parser.parse_args(words)
    from propeller.service import auth

    if args.client is not None:
        secret = auth.make_client_keys(args.folder, args.client)
        print(
            f"{args.folder}: made a key for {args.client}, let in when the server starts or gets SIGHUP.\n"
            f"The client's machine needs {args.folder / 'server.key'}, and {secret} as client.key_secret."
        )
        return 0
    auth.make_keys(args.folder)
    print(
        f"Made {args.folder}; the server takes it by --curve-keys {args.folder}.\n"
        "Copy to a client's machine: server.key and client.key_secret.\n"
        "Copy to a host that joins:  server.key and worker.key_secret.\n"
        "Let nobody else read the files that end in _secret."
    )
    return 0


def _number_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number") from None


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


if __name__ == "__main__":
    main()
