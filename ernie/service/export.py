"""Makes a bundle of embeddings out of a pretrained folder, once: it is kept in the user's cache.

    python -m ernie.service.export -m MODEL [--encode-layer layer-2] [--pooling mean] ...

MODEL is a folder in the project's own layout or a Hugging Face BERT or ERNIE folder as it is. The bundle's
folder is the last line on standard output. What is not asked for is as the folder says.

`encoder_bundle` does the same for a server: if the bundle is not there it runs this command in a process of
its own, so that the server stays free of Paddle.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ernie.config import ErnieConfig
from ernie.pretrained import load_pretrained_config
from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.pooling import PROMPTS, EncoderOptions, read_folder, resolve
from ernie.tokenizing import Tokenizer, load_tokenizer
from propeller import atomic, cli
from propeller.bundle import DESCRIPTION, read_bundle
from propeller.data import default_folder, pad_batch
from propeller.errors import ConfigError, ExportError
from propeller.tools.start_server import ServerParser
from propeller.version import __version__

log = logging.getLogger("ernie")

# Exports kept in a cache folder; those that run are kept in any case.
_KEPT = 8
# What the exported model is compared with the live one on: rows of many lengths, and padding.
_PROBE_TEXTS = (
    "",
    "The train to the coast leaves at half past seven, and the next one only after noon.",
    "春天来了，河边的柳树发出新芽，孩子们在草地上放风筝。",
    "Der Bäcker an der Ecke öffnet schon um fünf Uhr.",
    "昨日は雨が降ったので、図書館で本を読みました。",
    "La musique commence dès que les lumières s'éteignent ; personne ne parle plus.",
    "Где находится ближайшая аптека?",
    "😀 2 + 2 = 4",
)


def add_arguments(parser: ServerParser) -> None:
    """Adds the flags of `EncoderOptions`, and `--cache-dir`."""
    group = parser.add_argument_group("embeddings", "What is not given is as the model's folder says.")
    add = group.add_argument
    add("--encode-layer", metavar="pooler|layerN", help="layer1 to the model's last; layer-1: the last")
    add("--pooling", metavar="cls|mean|max|none|pooler", help="how tokens become one vector; none: stay many")
    add("--normalize", action=argparse.BooleanOptionalAction, help="bring embeddings to length 1")
    add("--dimensions", type=int, metavar="D", help="keep the first D numbers of an embedding")
    add("--max-seqlen", type=int, metavar="TOKENS", help="the longest input; what is longer is cut")
    for kind in PROMPTS:
        add(f"--{kind}-prefix", metavar="TEXT", help=f"stands before a text that is sent as a {kind}")
    add("--cache-dir", type=Path, metavar="DIR", help="for the newest exports; default: ~/.cache/propeller")


def options_from(args: argparse.Namespace) -> EncoderOptions:
    """Reads the flags of `add_arguments`."""
    return EncoderOptions(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(EncoderOptions)}
    )


def encoder_bundle(
    source: str | Path, options: EncoderOptions | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Returns the bundle of an encoder, which is kept as long as this process runs; loads no Paddle.

    Args:
        source: a bundle, which is taken as it is, or a pretrained folder.
        options: what is asked for beyond what the folder says.
        cache_dir: where exports are kept; None: the user's cache folder.

    Raises:
        ConfigError: the folder or an option cannot be used, or a bundle is otherwise than is asked for.
        CheckpointError: the folder's weights or configuration are missing or cannot be read.
        ExportError: a bundle is damaged or none of embeddings, or the export failed.
    """
    source, options = Path(source), options or EncoderOptions()
    if (source / DESCRIPTION).is_file():
        _check_bundle(source, options)
        return source
    export = EncoderExport(source, options, cache_dir)
    _hold(export.folder)
    if export.is_whole():
        log.info("taking the export of %s in %s", source, export.folder)
        return export.folder
    folder = _export_aside(source, options, cache_dir)
    _hold(folder)
    return folder


def _hold(folder: Path) -> None:
    """Marks an export, if it is there, as used, and keeps it from being removed while this process runs."""
    with contextlib.suppress(OSError):  # no such file, another user's, or a file system without locks
        os.utime(folder)
        # Never closed, which would give the lock back.
        fcntl.flock(os.open(folder / DESCRIPTION, os.O_RDONLY), fcntl.LOCK_SH)


def _keep_newest(folder: Path) -> None:
    """Removes the exports beside this one that were not used for longest, and that nobody runs."""
    # What cannot be removed stays: that costs space, no more.
    with contextlib.suppress(OSError):
        others = [other for other in folder.parent.glob("[0-9a-f]" * 32) if other != folder]
        others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
        for stale in others[_KEPT - 1 :]:
            with contextlib.suppress(OSError), (stale / DESCRIPTION).open("rb+") as description:
                atomic.lock_file(description, wait=False)
                shutil.rmtree(stale)


def _check_bundle(folder: Path, options: EncoderOptions) -> None:
    named = read_bundle(folder).metadata.get("processor") or {"name": "nothing but arrays"}
    if named["name"] != EmbeddingProcessor.name:
        raise ExportError(
            f"{folder} is a bundle of {named['name']}, not of embeddings. Serve it with propeller-server, or "
            "name the pretrained folder that it was made from."
        )
    for name, wanted in options.given().items():
        found = named["settings"].get(name)
        if found != wanted:
            raise ConfigError(
                f"{name} {wanted!r} is asked for, but the bundle {folder} was exported with {found!r}. Leave "
                "it out, or name the pretrained folder in the bundle's place."
            )


class EncoderExport:
    """The export of one pretrained folder with one set of options, and its place in the cache.

    Args:
        source: the pretrained folder.
        options: what is asked for beyond what it says.
        cache_dir: where exports are kept; None: the user's cache folder.

    Attributes:
        folder: where the bundle lies, or is to lie. Its name changes with whatever may change an answer.

    Raises:
        ConfigError: the folder or an option cannot be used.
        CheckpointError: weights or configuration are missing.
    """

    def __init__(self, source: Path, options: EncoderOptions, cache_dir: str | Path | None):
        found = read_folder(source)
        self.source = found.encoder
        config = load_pretrained_config(self.source)
        tokenizer = load_tokenizer(self.source)
        _check_tokenizer(tokenizer, config, self.source)
        if found.lower_case and not getattr(tokenizer, "do_lower_case", False):
            raise ConfigError(
                f"{source} says do_lower_case for sentence-transformers, but its tokenizer keeps capitals. "
                "Set do_lower_case to true, and strip_accents to false, in its tokenizer_config.json."
            )
        self.processor = EmbeddingProcessor(tokenizer, resolve(options, found, config))
        cache = default_folder() if cache_dir is None else Path(cache_dir)
        self.folder = cache / "encoders" / self._key(config)

    def _key(self, config: ErnieConfig) -> str:
        weights = sorted([*self.source.glob("*.safetensors"), *self.source.glob("*.bin")])
        parts = {
            "weights": {path.name: atomic.sha256(path) for path in weights},
            "config": config.to_dict(),
            "settings": dataclasses.asdict(self.processor.settings),
            "tokenizer": self.processor.tokenizer.fingerprint,
            "versions": {"ernie-propeller": __version__, **_paddle_versions()},
        }
        return hashlib.sha256(atomic.to_json(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def is_whole(self) -> bool:
        """Whether the bundle is there and undamaged."""
        if not self.folder.exists():
            return False
        try:
            read_bundle(self.folder)
        except ExportError as error:
            log.warning("exporting again: %s", error)
            return False
        return True

    def make(self) -> None:
        """Exports the bundle, unless it is there; of several processes one does so and the others wait.

        Raises:
            ConfigError: the cache folder cannot be written, or the weights lack what the options need.
            CheckpointError: the weights do not fit or cannot be read.
            ExportError: the model cannot be exported.
        """
        with self._locked():
            if self.is_whole():
                return
            # Nobody else writes now, so that what is half written is from a process that was killed.
            for left in self.folder.parent.glob(f".{self.folder.name}.*"):
                shutil.rmtree(left, ignore_errors=True)
            with atomic.new_folder(self.folder, replace=True) as temporary:
                self._write(temporary)
        _keep_newest(self.folder)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = self.folder.with_name(f"{self.folder.name}.lock").open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"The cache folder {self.folder.parent} cannot be written ({error.strerror}). Name another: "
                "--cache-dir DIR."
            ) from error
        with lock:
            atomic.lock_file(lock, wait=True)
            yield

    def _write(self, folder: Path) -> None:
        from ernie.tasks.encoder import load_encoder
        from propeller.paddle.runtime import set_device
        from propeller.paddle.train.exporter import export_bundle

        set_device("cpu")
        started = time.monotonic()
        model = load_encoder(self.source, self.processor.settings)
        examples = self.processor.prepare([{"text_a": text} for text in _PROBE_TEXTS])
        columns = pad_batch(examples, pad_values=self.processor.pad_values)
        export_bundle(folder, model, columns, processor=self.processor, metrics={})
        log.info("exported %s in %.1f s", self.source, time.monotonic() - started)


def _paddle_versions() -> dict[str, str]:
    """Name and version of the distributions that `paddle` comes from, without importing it."""
    names = importlib.metadata.packages_distributions().get("paddle", [])
    return {name: importlib.metadata.version(name) for name in sorted(set(names))}


def _check_tokenizer(tokenizer: Tokenizer, config: ErnieConfig, folder: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"The vocabulary of {folder} has {tokenizer.vocab_size} entries, the model only "
            f"{config.vocab_size}. They do not belong together."
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ConfigError(
            f"The vocabulary of {folder} pads with id {tokenizer.pad_token_id}, the model with pad_token_id "
            f"{config.pad_token_id}. They do not belong together."
        )


def _export_aside(source: Path, options: EncoderOptions, cache_dir: str | Path | None) -> Path:
    """Runs this module's command, which loads Paddle, in a process of its own."""
    log.info("exporting %s, which takes some seconds", source)
    command = [sys.executable, "-m", "ernie.service.export", f"--model={source}"]
    given = options.given() | ({} if cache_dir is None else {"cache_dir": cache_dir})
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        command.append(
            f"{flag}={value}" if not isinstance(value, bool) else flag if value else f"--no-{name}"
        )
    # The packages that this process uses, wherever it has found them.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return Path(done.stdout.splitlines()[-1])
    said = done.stderr.strip()
    told = re.search(r"^error: (.*)", said, re.DOTALL | re.MULTILINE)  # as `cli.run` writes it
    kind = ConfigError if done.returncode == 2 else ExportError
    raise kind(
        told[1] if told else f"The export of {source} ended with status {done.returncode}: {said[-2000:]}"
    )


def main() -> NoReturn:
    """Runs the command."""
    cli.run(_main)
    raise AssertionError("cli.run ends the process")


def _main(argv: Sequence[str] | None = None) -> int:
    parser = ServerParser(__doc__)
    parser.add_argument(
        "-m", "--model", required=True, type=Path, metavar="MODEL", help="the pretrained folder"
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    cli.setup_logging()
    export = EncoderExport(args.model, options_from(args), args.cache_dir)
    export.make()
    print(export.folder)
    return 0


if __name__ == "__main__":
    main()
