"""Answers a stream of inputs in order, batched by length, in bounded memory.

lines -> reader thread -> chunk of what is there -> parse -> prepare -> sort by length -> pad
      -> predict -> finish -> put back in order -> write, flush
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TextIO

import numpy as np

from propeller import atomic
from propeller.data import pad_batch
from propeller.errors import DataError, PropellerError
from propeller.paddle.inference import Predictor
from propeller.processor import Answer, Processor, Raw, prepare_each

CHUNK_ROWS = 2048
BATCH_ROWS = 32

_BLOCK_BYTES = 1 << 16
_READ_AHEAD_BLOCKS = 16
# How long a chunk that is not full waits for more: the reader gets its turn, nobody who types notices.
_PAUSE_S = 0.005


def answer_all(
    predictor: Predictor, processor: Processor, raws: Sequence[Raw | PropellerError]
) -> list[Answer | PropellerError]:
    """Answers a chunk of raw examples, one answer or error for each, in order.

    Args:
        predictor: the model.
        processor: its task.
        raws: examples; an error stays where it is.
    """
    answers: list[Answer | PropellerError] = [raw for raw in raws]  # type: ignore[misc]
    good = [place for place, raw in enumerate(raws) if not isinstance(raw, PropellerError)]
    examples: list[tuple[int, dict[str, Any]]] = []
    for place, prepared in zip(good, prepare_each(processor, [raws[i] for i in good]), strict=True):  # type: ignore[misc]
        if isinstance(prepared, PropellerError):
            answers[place] = prepared
        else:
            examples.append((place, prepared))
    first = predictor.bundle.inputs[0].name
    examples.sort(key=lambda item: len(item[1][first]))
    for start in range(0, len(examples), BATCH_ROWS):
        members = examples[start : start + BATCH_ROWS]
        batch_answers = _answer_batch(predictor, processor, [example for _, example in members])
        for (place, _), answer in zip(members, batch_answers, strict=True):
            answers[place] = answer
    return answers


def _answer_batch(
    predictor: Predictor, processor: Processor, examples: list[dict[str, Any]]
) -> list[Answer | PropellerError]:
    """Answers one batch; if that fails each example is tried alone, so that a bad one harms no neighbour."""
    try:
        outputs = predictor.predict(_padded(predictor, examples))
        return list(processor.finish(outputs))
    except (PropellerError, RuntimeError, ValueError) as error:  # Paddle raises the last two
        if len(examples) == 1:
            return [DataError(f"prediction failed: {' '.join(str(error).split())[-300:]}")]
        return [answer for one in examples for answer in _answer_batch(predictor, processor, [one])]


def _padded(predictor: Predictor, examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Pads to the longest row and no further: padding takes more time than preparing a new shape."""
    specs = predictor.bundle.inputs
    return pad_batch(
        [{spec.name: example[spec.name] for spec in specs} for example in examples],
        pad_values={spec.name: spec.pad_value for spec in specs},
    )


def read_lines(source: BinaryIO, processor: Processor) -> Iterator[list[Raw | PropellerError]]:
    """Parses lines as they come, in chunks of what is there, `CHUNK_ROWS` at most.

    A thread reads ahead, so that a chunk is complete when the reader has to wait: somebody who types
    gets each answer at once, a file is read in large chunks. Only `\\n`, or `\\r\\n`, ends a line.

    Raises:
        DataError: the input cannot be read any further; what was read before has been given.
    """
    blocks: queue.Queue[list[bytes] | DataError | None] = queue.Queue(maxsize=_READ_AHEAD_BLOCKS)
    threading.Thread(target=_read_blocks, args=(source, blocks), name="stdin", daemon=True).start()
    number = itertools.count(1)
    lines: list[bytes] = []
    end: list[DataError | None] = []
    while lines or not end:
        while len(lines) < CHUNK_ROWS and not end:
            try:
                block = blocks.get(timeout=_PAUSE_S if lines else None)
            except queue.Empty:
                break
            if isinstance(block, list):
                lines += block
            else:
                end.append(block)
        chunk, lines = lines[:CHUNK_ROWS], lines[CHUNK_ROWS:]
        if chunk:
            yield [_parsed(processor, line, next(number)) for line in chunk]
    if end[0] is not None:
        raise end[0]


def _read_blocks(source: BinaryIO, blocks: queue.Queue[list[bytes] | DataError | None]) -> None:
    """Puts what can be read at a time, cut into lines; at the end None or the error."""
    unfinished: list[bytes] = []
    try:
        while block := source.read1(_BLOCK_BYTES):  # type: ignore[attr-defined]  # returns what is there
            if b"\n" not in block:
                unfinished.append(block)
                continue
            *lines, rest = b"".join([*unfinished, block]).split(b"\n")
            unfinished = [rest] if rest else []
            blocks.put(lines)
        if unfinished:
            blocks.put([b"".join(unfinished)])
        blocks.put(None)
    except Exception as error:  # whatever it is, the consumer must not wait for more
        blocks.put(DataError(f"The input cannot be read any further: {error}."))


def _parsed(processor: Processor, line: bytes, number: int) -> Raw | PropellerError:
    try:
        return processor.parse(line.removesuffix(b"\r").decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"line {number} is not UTF-8 ({error.reason} at byte {error.start})")
    except DataError as error:
        return error


def format_text(processor: Processor) -> Callable[[Answer | PropellerError], str]:
    """Plain text: the processor's own form, `#error<TAB>reason` for an error."""

    def write(answer: Answer | PropellerError) -> str:
        if isinstance(answer, PropellerError):
            return "#error\t" + " ".join(str(answer).split())
        return processor.format(answer)

    return write


def format_jsonl(answer: Answer | PropellerError) -> str:
    """One JSON object a line, `{"error": ...}` for an error."""
    return atomic.to_json({"error": str(answer)} if isinstance(answer, PropellerError) else answer)


def predict_lines(
    predictor: Predictor,
    source: BinaryIO,
    target: TextIO,
    *,
    processor: Processor,
    write: Callable[[Answer | PropellerError], str],
) -> int:
    """Writes one line for each line read, in order, flushed chunk by chunk.

    Returns:
        The number of lines answered by an error.
    """
    errors = 0
    for raws in read_lines(source, processor):
        answers = answer_all(predictor, processor, raws)
        errors += sum(isinstance(answer, PropellerError) for answer in answers)
        target.write("".join(write(answer) + "\n" for answer in answers))
        target.flush()
    return errors


def answer_stream(
    predictor: Predictor, processor: Processor, raws: Iterable[Raw]
) -> Iterator[Answer | PropellerError]:
    """Answers any number of raw examples, in order, chunk by chunk."""
    iterator = iter(raws)
    while chunk := list(itertools.islice(iterator, CHUNK_ROWS)):
        yield from answer_all(predictor, processor, chunk)
