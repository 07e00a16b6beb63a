"""Bulk encoding: a file or standard input, one text a line, to one vector a line.

    lines -> thread: blocks of what is there -> encoded, some at a time -> in order -> written, made safe

A run that was killed goes on when it is started again by the same command: see `vector_file.py`. Rows that
were made safe are not computed again. All others come from the server, which batches them with whatever else
it is asked at that moment, and a batch of another shape adds numbers up in another order: two runs agree to
float32 rounding (about 1e-6), not bit by bit, with or without a kill between them.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ernie.service.calls import address_of, run
from ernie.service.encoder import Encoder, Served
from ernie.service.lines import Block, LineReader
from ernie.service.texts import TextJob
from ernie.service.vector_file import (
    Format,
    JsonLines,
    Npy,
    PartFile,
    Pipe,
    Position,
    Progress,
    Row,
    Target,
)
from ernie.tasks.pooling import PROMPTS
from propeller import cli
from propeller.data import Dataset
from propeller.errors import BadRequest, ConfigError, ServerError, ServiceError, WorkerDied
from propeller.service.client import InferenceClient

log = logging.getLogger("ernie")

# Blocks that are encoded at a time, and those that are read ahead of them.
_THREADS = 4
_BLOCKS_AHEAD = 4
_MAX_SHOWN_ERRORS = 20
# How often it is logged how far it is, where there is no terminal for a progress bar.
_LOG_S = 30.0


class LineEncoder:
    """Makes blocks of lines to rows.

    Args:
        client: the server.
        served: a fitting tokenizer, if the client is to tokenise.
        prompt: goes before each text.

    Attributes:
        encoder: what is served.

    Raises:
        ConfigError: no encoder is served, or none that fits.
        ServiceError: the server does not answer.
    """

    def __init__(self, client: InferenceClient, served: Served, prompt: str | None):
        self.encoder = served.update(client.spec())
        self._client, self._served, self._prompt = client, served, prompt

    @property
    def max_seqlen(self) -> int:
        """Tokens that a line is cut to."""
        return self._served.max_seqlen or self.encoder.max_seqlen

    def options(self) -> dict[str, Any]:
        """What decides the vectors, besides the texts."""
        return {"model": self.encoder.bundle, "prompt": self._prompt, "max_seqlen": self._served.max_seqlen}

    def check(self) -> None:
        """Makes sure that the model is still the one of the start.

        Raises:
            ServerError: it is another one.
        """
        now = Encoder.from_spec(self._client.spec())
        if now.bundle != self.encoder.bundle:
            raise ServerError(
                f"The server has taken over another model: {now.bundle[:12]}, where the run was begun with "
                f"{self.encoder.bundle[:12]}. Vectors of two models do not belong in one file; begin anew "
                "with --restart, or serve the first one again."
            )

    def encode(self, block: Block) -> tuple[list[Row], int]:
        """Makes the rows of a block; a bad line harms no neighbour.

        Returns:
            The rows, and how many texts were cut.

        Raises:
            ServiceError: none of several lines has a vector, by no fault of theirs; or there is no answer.
        """
        rows: list[Row] = [str(line) for line in block.lines]
        good = [place for place, line in enumerate(block.lines) if isinstance(line, str)]
        found, truncated = self._rows([line for line in block.lines if isinstance(line, str)])
        failed = [row for row in found if isinstance(row, ServerError | WorkerDied)]
        if len(failed) == len(good) > 1:
            raise failed[0]
        for place, row in zip(good, found, strict=True):
            rows[place] = str(row) if isinstance(row, ServiceError) else row
        return rows, truncated

    def _rows(self, texts: list[str]) -> tuple[list[Row | ServiceError], int]:
        try:
            job = TextJob(
                self.encoder,
                texts,
                prompt=self._prompt,
                tokenizer=self._served.tokenizer,
                max_seqlen=self._served.max_seqlen,
            )
            encoded = run(self._client, job)
        except (BadRequest, ServerError, WorkerDied) as error:
            if len(texts) == 1:
                return [error], 0
            middle = len(texts) // 2
            first, second = self._rows(texts[:middle]), self._rows(texts[middle:])
            return first[0] + second[0], first[1] + second[1]
        rows: list[Row | ServiceError] = [
            vector if np.isfinite(vector).all() else "the model gave numbers that are not finite"
            for vector in encoded.embeddings
        ]
        return rows, int(encoded.truncated.sum())


def encode_lines(reader: LineReader, encoder: LineEncoder, target: Target, bar: Any) -> None:
    """Encodes what the reader has left, and finishes the target.

    Args:
        reader: gives the lines.
        encoder: makes rows of them.
        target: takes these.
        bar: a progress bar over bytes.

    Raises:
        ServiceError: the server does not answer any more, or with another model; what was made safe is kept.
    """
    pool = ThreadPoolExecutor(_THREADS)
    logged_at = time.monotonic()

    def submitted() -> Iterator[tuple[Block, Future[tuple[list[Row], int]]]]:
        for block in reader.blocks():
            yield block, pool.submit(encoder.encode, block)

    try:
        for block, future in Dataset.from_generator_func(submitted).buffered(_BLOCKS_AHEAD):
            before = target.written
            rows, truncated = future.result()
            target.write(rows, block.position, truncated)
            _show_errors(rows, before)
            bar.update(block.position.num_bytes - before.position.num_bytes)
            bar.set_postfix(lines=block.position.lines, refresh=False)
            if bar.disable and time.monotonic() - logged_at >= _LOG_S:
                logged_at = time.monotonic()
                share = f", {block.position.num_bytes / bar.total:.0%} of the input" if bar.total else ""
                log.info("%d lines%s", block.position.lines, share)
            if target.is_due():
                encoder.check()
                target.commit()
        encoder.check()
        target.finish()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _show_errors(rows: Sequence[Row], before: Progress) -> None:
    """Logs why lines have no vector, those of the first so many."""
    shown = before.errors
    for number, row in enumerate(rows, before.position.lines + 1):
        if isinstance(row, str):
            shown += 1
            if shown <= _MAX_SHOWN_ERRORS:
                log.error("line %d: %s", number, row)
            elif shown == _MAX_SHOWN_ERRORS + 1:
                log.error("further lines with errors are counted, not shown")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 1 if a line has no vector. The output is whole all the same, a row for each line.

    Raises:
        ConfigError: a flag, or what an earlier run left, does not fit.
        ServiceError: the server does not answer.
    """
    args = _parser().parse_args(argv)
    cli.setup_logging()
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size is {args.batch_size}; expected at least 1.")
    served = Served(args.vocab, args.max_seqlen)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            InferenceClient(
                address_of(args.host, args.port),
                timeout=args.timeout,
                model=args.model,
                curve_keys=args.curve_keys,
            )
        )
        source, size = _source(args.input, stack)
        _check_apart(source, args.output)
        encoder = LineEncoder(client, served, args.prompt)
        reader = LineReader(source, args.batch_size)
        target = _target(args, encoder, reader.position, stack)
        begun = target.written.position
        if begun.num_bytes:
            log.info("going on behind line %d of %s", begun.lines, args.input or "the input")
            reader.skip(begun)
        bar = stack.enter_context(
            tqdm(
                total=size,
                initial=begun.num_bytes,
                unit="B",
                unit_scale=True,
                disable=not sys.stderr.isatty(),
            )
        )
        started = time.monotonic()
        try:
            encode_lines(reader, encoder, target, bar)
        except (ServiceError, KeyboardInterrupt):
            if target.kept is not None:
                log.error("stopped; the same command goes on behind line %d", target.kept.position.lines)
            raise
    _sum_up(target, begun, time.monotonic() - started, args.output, encoder.max_seqlen)
    return 1 if target.written.errors else 0


def _sum_up(target: Target, begun: Position, seconds: float, output: str | None, max_seqlen: int) -> None:
    done = target.written
    if target.kept is not None:  # of a pipe the reader knows
        speed = (done.position.lines - begun.lines) / max(seconds, 1e-9)
        log.info("%d lines in %s, %.0f lines/s", done.position.lines, output, speed)
    if done.truncated:
        log.warning("%d of %d lines were cut to %d tokens", done.truncated, done.position.lines, max_seqlen)
    if done.errors:
        log.error("%d of %d lines have no vector", done.errors, done.position.lines)


def _source(path: str | None, stack: contextlib.ExitStack) -> tuple[BinaryIO, int | None]:
    """The input, and how many bytes it has if that is known."""
    if path is None or path == "-":
        if sys.stdin is None:
            raise ConfigError("There is no standard input; name a file: -i FILE.")
        # Not its own buffer: a thread that waits in that keeps its lock, and then Python aborts at exit.
        return stack.enter_context(open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)), None
    try:
        source = stack.enter_context(open(path, "rb", buffering=0))
    except OSError as error:
        raise ConfigError(f"The input {path} cannot be read ({error.strerror}).") from error
    info = os.fstat(source.fileno())
    return source, info.st_size if stat.S_ISREG(info.st_mode) else None


def _check_apart(source: BinaryIO, output: str | None) -> None:
    """Refuses to write over what is read.

    Raises:
        ConfigError: input and output are one file.
    """
    with contextlib.suppress(OSError):  # the output is not there yet, or is standard output
        info = os.fstat(source.fileno())
        if output is not None and stat.S_ISREG(info.st_mode) and os.path.samestat(info, os.stat(output)):
            raise ConfigError(f"{output} is the input; write the vectors to another file.")


def _target(
    args: argparse.Namespace, encoder: LineEncoder, start: Position, stack: contextlib.ExitStack
) -> Target:
    """Where rows go; a device or a named pipe takes them as standard output does.

    Raises:
        ConfigError: they cannot go there.
    """
    path = None if args.output in (None, "-") else Path(args.output)
    kind = args.format or ("npy" if path is not None and path.suffix == ".npy" else "jsonl")
    if kind == "npy" and encoder.encoder.per_token:
        raise ConfigError(
            "The model gives a vector for each token; an npy array has one for each line. Use --format jsonl."
        )
    form: Format = Npy(encoder.encoder.dim) if kind == "npy" else JsonLines()
    if path is not None and (path.is_file() or not path.exists()):
        options = {"format": kind, **encoder.options()}
        file = PartFile(path, form, options, start, restart=args.restart)
        return stack.enter_context(contextlib.closing(file))
    if args.restart:
        raise ConfigError("--restart is for an output file; what went to a pipe cannot be taken back.")
    try:
        sink = sys.stdout.buffer if path is None else stack.enter_context(open(path, "wb"))
    except OSError as error:
        raise ConfigError(f"The output {path} cannot be written ({error.strerror}).") from error
    return stack.enter_context(contextlib.closing(Pipe(sink, form, start)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ernie.service.client",
        description="Encodes a file, or standard input, one text a line, to one vector a line.",
        epilog="A run that was killed goes on when it is started again by the same command. A line that "
        'cannot be encoded gets a row of NaN ({"error": ...} in JSON lines), and the exit status is 1.',
    )
    parser.add_argument("-i", "--input", help="UTF-8 text; default: standard input")
    parser.add_argument("-o", "--output", help="default: standard output")
    parser.add_argument(
        "--format",
        choices=("npy", "jsonl"),
        help="a float32 array, or a JSON object a line; default: by the output's name, else jsonl",
    )
    parser.add_argument("--host", default="localhost", help="where the encoder server runs")
    parser.add_argument("--port", type=int, default=8888, help="its port")
    parser.add_argument("--model", help="which of the server's models; its first by default")
    parser.add_argument("--curve-keys", help="folder of the keys that the server wants to see")
    parser.add_argument(
        "--vocab", help="vocab.txt or tokenizer folder, to tokenise here; default: the server does"
    )
    parser.add_argument("--max_seqlen", type=int, help="cut texts to fewer tokens; needs --vocab")
    parser.add_argument(
        "--prompt", choices=PROMPTS, help="what goes before each text, for models that want that"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="lines that are sorted and sent together")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        help="seconds to wait for an answer; a server that is started again within them costs nothing",
    )
    parser.add_argument("--restart", action="store_true", help="drop what an earlier run has left")
    return parser
