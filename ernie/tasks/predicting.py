"""Prediction by the scripts: lines of standard input, and whole files of examples."""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from propeller import atomic
from propeller.bundle import read_bundle
from propeller.errors import ConfigError, DataError, PropellerError
from propeller.types import RunConfig

log = logging.getLogger("ernie")


def predict_stdin(args: argparse.Namespace, run_config: RunConfig) -> int:
    """Answers the lines of standard input by the exported model, one line for each, in order.

    Returns:
        The exit code: 1 with `--strict` if a line could not be read, else 0.
    """
    if sys.stdin is None:
        raise ConfigError("Standard input is closed: there are no lines to answer.")
    folder = Path(args.bundle or Path(run_config.model_dir) / "best" / "inference")
    bundle = read_bundle(folder)
    processor = bundle.processor()
    from propeller.paddle import stream
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import set_device

    predictor = Predictor(bundle, device=set_device(run_config.device), bf16=args.bf16)
    # Not sys.stdin's own buffer: a thread that waits in it keeps its lock, and then Python aborts at exit.
    lines = open(sys.stdin.fileno(), "rb", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # UTF-8 in, UTF-8 out, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    write = stream.format_jsonl if args.format == "jsonl" else stream.format_text(processor)
    errors = stream.predict_lines(predictor, lines, sys.stdout, processor=processor, write=write)
    if errors:
        log.warning("%d lines could not be read", errors)
    return 1 if errors and args.strict else 0


def write_predictions(path: str, folder: Path, raws: Iterable[Mapping[str, Any]]) -> None:
    """Writes raw examples with the exported model's answers, a JSON object a line.

    Raises:
        DataError: the file cannot be written.
    """
    from propeller.paddle import stream
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import paddle

    bundle = read_bundle(folder)
    predictor = Predictor(bundle, device=paddle.get_device())  # where the training ran
    lines: list[str] = []
    examples = list(raws)
    for raw, answer in zip(
        examples, stream.answer_stream(predictor, bundle.processor(), examples), strict=True
    ):
        prediction = {"error": str(answer)} if isinstance(answer, PropellerError) else answer
        lines.append(atomic.to_json({**raw, "prediction": prediction}) + "\n")
    try:
        atomic.write_text(Path(path), "".join(lines))
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", path=path) from error
    log.info("wrote %d predictions to %s", len(lines), path)
