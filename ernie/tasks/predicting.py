"""Prediction by the scripts: lines of standard input, and whole files of examples."""

from __future__ import annotations

import io
import itertools
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from propeller import atomic
from propeller.bundle import read_bundle
from propeller.errors import ConfigError, DataError, PropellerError

log = logging.getLogger("ernie")

_SHOWN_LINES = 10


def predict_stdin(
    folder: str | Path,
    *,
    device: str | None = None,
    bf16: bool = False,
    form: str = "tsv",
    strict: bool = False,
    task: str | None = None,
) -> int:
    """Answers the lines of standard input by an exported model, one line for each, in order.

    Args:
        folder: the bundle.
        device: any that Paddle knows; None takes a GPU where there is one.
        bf16: compute in bfloat16 (CPU).
        form: `tsv`, the processor's own form, or `jsonl`.
        strict: whether a line that cannot be answered makes the exit code 1.
        task: the name of the processor that it must have; None: any.

    Returns:
        The exit code.

    Raises:
        ConfigError: standard input is closed, the device cannot be used, or it is the bundle of another task.
        ExportError: no bundle, a damaged one, or one that cannot be run.
        DataError: the input cannot be read to its end; what came before is answered.
    """
    if sys.stdin is None:
        raise ConfigError("Standard input is closed: there are no lines to answer.")
    bundle = read_bundle(folder)
    processor = bundle.processor()
    if task is not None and processor.name != task:
        raise ConfigError(
            f"{folder} is a bundle of the task {processor.name!r}, not of {task!r}. `ernie predict` answers "
            "by any of them."
        )
    from propeller.paddle import stream
    from propeller.paddle.inference import Predictor
    from propeller.paddle.runtime import set_device

    predictor = Predictor(bundle, device=set_device(device), bf16=bf16)
    # Not sys.stdin's own buffer: a thread that waits in it keeps its lock, and then Python aborts at exit.
    lines = open(sys.stdin.fileno(), "rb", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # UTF-8 in, UTF-8 out, whatever the locale
        # Half a character, which UTF-8 cannot hold, as an escape of JSON.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    write = stream.format_jsonl if form == "jsonl" else stream.format_text(processor)
    numbers = itertools.count(1)
    bad: list[str] = []

    def noted(raw: Any, answer: Any) -> str:
        text = write(raw, answer)  # where this fails, the line is written once more, as that error
        number = next(numbers)
        if isinstance(answer, PropellerError) and len(bad) < _SHOWN_LINES:
            bad.append(str(number))
        return text

    errors = stream.predict_lines(predictor, lines, sys.stdout, processor=processor, write=noted)
    if errors:
        more = ", ..." if errors > len(bad) else ""
        log.warning("%d lines could not be answered: %s%s", errors, ", ".join(bad), more)
    return 1 if errors and strict else 0


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
    # Half a character, which JSON can name and UTF-8 cannot hold, stays what it was: the escape of JSON.
    text = "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")
    try:
        atomic.write_text(Path(path), text)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", path=path) from error
    log.info("wrote %d predictions to %s", len(lines), path)
