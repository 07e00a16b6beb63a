"""Answers a stream of inputs in order, batched by length, in bounded memory.

lines -> reader thread -> chunk of what is there -> parse -> windows -> sort by length -> pad
      -> predict -> finish -> join the windows of each -> put back in order -> write, flush
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TextIO

import numpy as np

from propeller import atomic, lines
from propeller.data import pad_batch
from propeller.errors import DataError, PropellerError
from propeller.paddle.inference import Predictor
from propeller.processor import Answer, Processor, Raw, as_answer, windows_each

CHUNK_ROWS = 2048
BATCH_ROWS = 32

# Examples prepared at a time: how many windows they make is known only afterwards.
_PREPARE_RAWS = 256
_BLOCK_BYTES = 1 << 16
_READ_AHEAD_BLOCKS = 16
# How long a chunk that is not full waits for more: the reader gets its turn, nobody who types notices.
_PAUSE_S = 0.005

# What is read, what it is answered by, and how both become a line of output.
Given = Raw | PropellerError
Result = Answer | PropellerError
Write = Callable[[Given, Result], str]

_Examples = list[dict[str, Any]]
_Line = str | DataError


def answer_all(predictor: Predictor, processor: Processor, raws: Sequence[Given]) -> list[Result]:
    """Answers a chunk of raw examples, one answer or error for each, in order.

    Whatever is raised for an example is its answer, see `as_answer`, and harms no other.

    Windows of all of them are sorted by length and run together; no more than about `CHUNK_ROWS` are held.

    Args:
        predictor: the model.
        processor: its task.
        raws: examples; an error stays where it is.
    """
    answers: list[Result] = [raw for raw in raws]  # type: ignore[misc]
    good = [(place, raw) for place, raw in enumerate(raws) if not isinstance(raw, PropellerError)]
    held: dict[int, _Examples] = {}
    for start in range(0, len(good), _PREPARE_RAWS):
        part = good[start : start + _PREPARE_RAWS]
        prepared = windows_each(processor, [raw for _, raw in part])
        for (place, _), windows in zip(part, prepared, strict=True):
            if isinstance(windows, PropellerError):
                answers[place] = windows
            else:
                held[place] = windows
        is_last = start + _PREPARE_RAWS >= len(good)
        if is_last or sum(map(len, held.values())) >= CHUNK_ROWS:
            for place, parts in _parts(predictor, processor, held).items():
                answers[place] = _joined(processor, raws[place], held[place], parts)  # type: ignore[arg-type]
            held.clear()
    return answers


def _parts(
    predictor: Predictor, processor: Processor, held: Mapping[int, _Examples]
) -> dict[int, list[Result]]:
    """What the model and `finish` make of windows, by their example."""
    first = predictor.bundle.inputs[0].name
    rows = [(place, number) for place, windows in held.items() for number in range(len(windows))]
    rows.sort(key=lambda row: _size(held[row[0]][row[1]], first))
    parts: dict[int, list[Result]] = {place: [{}] * len(windows) for place, windows in held.items()}
    for start in range(0, len(rows), BATCH_ROWS):
        members = rows[start : start + BATCH_ROWS]
        batch = [held[place][number] for place, number in members]
        for (place, number), part in zip(members, _answer_batch(predictor, processor, batch), strict=True):
            parts[place][number] = part
    return parts


def _size(window: Mapping[str, Any], name: str) -> int:
    """Numbers in a feature; 0 where there is no array of them, which is an error when it is padded."""
    try:
        return np.size(window[name])
    except (LookupError, TypeError, ValueError):
        return 0


def _joined(processor: Processor, raw: Raw, windows: _Examples, parts: Sequence[Result]) -> Result:
    """The answer of one example; the first error where a window has one."""
    for part in parts:
        if isinstance(part, PropellerError):
            return part
    try:
        return processor.join(raw, windows, parts)  # type: ignore[arg-type]  # there is no error in it
    except Exception as error:
        return as_answer(error)


def _answer_batch(predictor: Predictor, processor: Processor, examples: _Examples) -> list[Result]:
    """Answers one batch; if that fails its halves, and so on, so that a bad example harms no neighbour."""
    try:
        answers = list(processor.finish(predictor.predict(_padded(predictor, examples))))
        if len(answers) != len(examples):
            raise PropellerError(
                f"The processor {processor.name!r} gave {len(answers)} answers for {len(examples)} rows; "
                "expected one for each."
            )
        return [*answers]
    except Exception as error:
        problem = as_answer(error)
    if len(examples) == 1:
        return [problem]
    half = len(examples) // 2
    return [
        answer
        for part in (examples[:half], examples[half:])
        for answer in _answer_batch(predictor, processor, part)
    ]


def _padded(predictor: Predictor, examples: _Examples) -> dict[str, np.ndarray]:
    """Pads to the longest row and no further: padding takes more time than preparing a new shape."""
    specs = predictor.bundle.inputs
    return pad_batch(
        [{spec.name: example[spec.name] for spec in specs} for example in examples],
        pad_values={spec.name: spec.pad_value for spec in specs},
    )


def read_lines(source: BinaryIO, processor: Processor) -> Iterator[list[Given]]:
    """Parses lines as they come, in chunks of what is there, `CHUNK_ROWS` at most.

    A thread reads ahead, so that a chunk is complete when the reader has to wait: somebody who types
    gets each answer at once, a file is read in large chunks. Only `\\n`, or `\\r\\n`, ends a line. One
    that is no UTF-8, or longer than `propeller.lines.MAX_LINE_BYTES`, is answered by an error.

    Raises:
        DataError: the input cannot be read any further; what was read before has been given.
    """
    blocks: queue.Queue[list[_Line] | DataError | None] = queue.Queue(maxsize=_READ_AHEAD_BLOCKS)
    threading.Thread(target=_read_blocks, args=(source, blocks), name="stdin", daemon=True).start()
    held: list[_Line] = []
    end: list[DataError | None] = []
    while held or not end:
        while len(held) < CHUNK_ROWS and not end:
            try:
                block = blocks.get(timeout=_PAUSE_S if held else None)
            except queue.Empty:
                break
            if isinstance(block, list):
                held += block
            else:
                end.append(block)
        chunk, held = held[:CHUNK_ROWS], held[CHUNK_ROWS:]
        if chunk:
            yield [_parsed(processor, line) for line in chunk]
    if end[0] is not None:
        raise end[0]


def _read_blocks(source: BinaryIO, blocks: queue.Queue[list[_Line] | DataError | None]) -> None:
    """Puts what can be read at a time, cut into lines; at the end None or the error."""
    number = itertools.count(1)
    begun, dropped = b"", 0  # of the line at hand: what is kept, and the bytes that are not

    def ended(line: bytes) -> _Line:
        nonlocal dropped
        size, dropped = dropped + len(line), 0
        return lines.line_text(line, size, f"line {next(number)}")

    try:
        while block := source.read1(_BLOCK_BYTES):  # type: ignore[attr-defined]  # returns what is there
            *whole, begun = (begun + block).split(b"\n")
            if whole:
                blocks.put([ended(line) for line in whole])
            if len(begun) > lines.MAX_LINE_BYTES:
                begun, dropped = b"", dropped + len(begun)
        if begun or dropped:
            blocks.put([ended(begun)])
        blocks.put(None)
    except Exception as error:  # whatever it is, the consumer must not wait for more
        blocks.put(DataError(f"The input cannot be read any further: {error}."))


def _parsed(processor: Processor, line: _Line) -> Given:
    if isinstance(line, DataError):
        return line
    try:
        return processor.parse(line)
    except Exception as error:
        return as_answer(error)


def format_text(processor: Processor) -> Write:
    """Plain text: the processor's own form, `#error<TAB>reason` for an error."""

    def write(raw: Given, answer: Result) -> str:
        if isinstance(raw, PropellerError) or isinstance(answer, PropellerError):
            return "#error\t" + " ".join(str(answer).split())
        return processor.format(raw, answer)

    return write


def format_jsonl(raw: Given, answer: Result) -> str:
    """One JSON object a line, `{"error": ...}` for an error."""
    return atomic.to_json({"error": str(answer)} if isinstance(answer, PropellerError) else answer)


def predict_lines(
    predictor: Predictor,
    source: BinaryIO,
    target: TextIO,
    *,
    processor: Processor,
    write: Write,
) -> int:
    """Writes one line for each line read, in order, flushed chunk by chunk.

    Returns:
        The number of lines answered by an error.
    """
    errors = 0
    for raws in read_lines(source, processor):
        answers = answer_all(predictor, processor, raws)
        written = [_written(write, *item) for item in zip(raws, answers, strict=True)]
        errors += sum(is_error for _, is_error in written)
        target.write("".join(f"{line}\n" for line, _ in written))
        target.flush()
    return errors


def _written(write: Write, raw: Given, answer: Result) -> tuple[str, bool]:
    """A line of output, and whether it tells an error; that of writing it, if there is one."""
    try:
        return write(raw, answer), isinstance(answer, PropellerError)
    except Exception as error:
        return write(raw, as_answer(error)), True


def answer_stream(
    predictor: Predictor, processor: Processor, raws: Iterable[Given]
) -> Iterator[Result]:
    """Answers any number of raw examples, in order, chunk by chunk."""
    iterator = iter(raws)
    while chunk := list(itertools.islice(iterator, CHUNK_ROWS)):
        yield from answer_all(predictor, processor, chunk)
