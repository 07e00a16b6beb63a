"""Questions on texts as files have them: SQuAD, CMRC2018, DuReader. `mrc_files` checks and repairs them.

Places in a structure are written as `data[0].paragraphs[2].qas[1].answers[0]`.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from propeller.data import decode_line, open_text_file
from propeller.errors import DataError, did_you_mean

NOWHERE = -1

_BOM = b"\xef\xbb\xbf"


class Question(NamedTuple):
    """A question as the file has it.

    Attributes:
        where: its place in the structure, for messages.
        line: its line, where the file has one question a line.
        id: as text.
        question: its text.
        context: the text that it is about.
        answers: text and start of each; the start is `NOWHERE` where the file says none.
        is_impossible: whether it is marked as having no answer.
    """

    where: str
    line: int | None
    id: str
    question: str
    context: str
    answers: list[tuple[str, int]]
    is_impossible: bool


def questions(path: Path) -> Iterator[Question]:
    """Yields the questions of a file of any of the formats.

    Raises:
        DataError: the file cannot be read, or is of another structure.
    """
    try:
        with open_text_file(path, None) as stream:
            head = stream.readline()
            # Nothing else has both keys in its first line, unescaped, and a look costs less than parsing.
            if b'"documents"' in head and b'"question_id"' in head:
                yield from _lines(path, itertools.chain([head.removeprefix(_BOM)], stream))
                return
            content = head + stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path) from error
    try:
        yield from _whole(_parsed(_decoded(content, path), path))
    except DataError as error:
        raise error if error.path is not None else DataError(str(error), path=path) from error


def _lines(path: Path, lines: Iterable[bytes]) -> Iterator[Question]:
    """Yields the questions of a DuReader file."""
    for number, raw in enumerate(lines, 1):
        text = decode_line(raw, path, number)
        if not text.strip():
            continue
        record = _parsed(text, path, number)
        try:
            yield _dureader_question(record)._replace(line=number)
        except DataError as error:
            raise DataError(str(error), path=path, line=number) from error


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"is not UTF-8 ({content[error.start : error.end]!r}). Convert the file, for example with iconv.",
            path=path,
            line=number,
        ) from error


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Parses JSON.

    Args:
        text: the JSON.
        path: where it comes from.
        line: its line, None if it is the whole file.
    """
    if not text.strip():
        raise DataError("is empty; expected JSON", path=path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        guess = "is it damaged?"
        if line is None and not text.lstrip().startswith(("{", "[")):
            guess = "expected a file as SQuAD, CMRC2018, DRCD or DuReader have it"
        elif error.msg.startswith("Unterminated") or not text[error.pos :].strip():
            guess = "the text ends there: was it cut short?"
        raise DataError(
            f"no JSON: {error.msg.removesuffix(' at')} at column {error.colno}; {guess}",
            path=path,
            line=line or error.lineno,
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON that can be read: {error}", path=path, line=line) from error


def _whole(root: Any) -> Iterator[Question]:
    """Yields the questions of a parsed file."""
    if isinstance(root, list):
        for place, article in enumerate(root):
            where = f"[{place}]"
            context = _text(article, "context_text", where)
            for inner, question in _items(article, "qas", where):
                yield _cmrc_question(question, context, inner)
        return
    for where, article in _items(root, "data", "the file", "data"):
        for inner, paragraph in _items(article, "paragraphs", where):
            context = _text(paragraph, "context", inner)
            for innermost, question in _items(paragraph, "qas", inner):
                yield _squad_question(question, context, innermost)


def _squad_question(value: Any, context: str, where: str) -> Question:
    name = _identifier(value, "id", where)
    where = f"{where} (id {name!r})"
    impossible = value.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise DataError(f"{where}: 'is_impossible' is {impossible!r:.80}; expected true or false")
    answers = []
    for inner, answer in _optional_items(value, "answers", where):
        text, start = _text(answer, "text", inner), _get(answer, "answer_start", inner)
        if not isinstance(start, int) or isinstance(start, bool):
            raise DataError(f"{inner}: 'answer_start' is {start!r:.80}; expected a whole number")
        answers.append((text, start))
    return Question(
        where, None, name, _text(value, "question", where), context, _not_blank(answers), impossible
    )


def _cmrc_question(value: Any, context: str, where: str) -> Question:
    name = _identifier(value, "query_id", where)
    where = f"{where} (id {name!r})"
    answers = [(text, NOWHERE) for text in _texts(value, "answers", where)]
    return Question(where, None, name, _text(value, "query_text", where), context, _not_blank(answers), False)


def _dureader_question(record: Any) -> Question:
    name = _identifier(record, "question_id", "the question")
    where = f"the question (id {name!r})"
    starts: list[list[int]] = []
    parts: list[str] = []
    length = 0
    for inner, document in _items(record, "documents", where):
        starts.append([])
        for paragraph in _texts(document, "paragraphs", inner, required=True):
            starts[-1].append(length)
            parts.append(paragraph)
            length += len(paragraph) + 1
    chosen = [
        (text, _chosen_start(record, place, starts))
        for place, text in enumerate(_texts(record, "fake_answers", where))
    ]
    written = [(text, NOWHERE) for text in _texts(record, "answers", where)]
    question = _text(record, "question", where)
    return Question(where, None, name, question, "\n".join(parts), _not_blank(chosen + written), False)


def _chosen_start(record: Any, place: int, starts: list[list[int]]) -> int:
    """Where in the context the preprocessing of DuReader says that `fake_answers[place]` begins.

    It counts words of the most related paragraph. Some of its indices lead nowhere; what comes out of them,
    as any start, holds only if the text does stand there.
    """
    try:
        number = record["answer_docs"][place]
        document = record["documents"][number]
        paragraph = document["most_related_para"]
        words = document["segmented_paragraphs"][paragraph][: record["answer_spans"][place][0]]
        return starts[number][paragraph] + len("".join(words))
    except (KeyError, IndexError, TypeError):
        return NOWHERE


def _not_blank(answers: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Leaves out empty answers, by which DuReader-checklist writes that there is none."""
    return [answer for answer in answers if answer[0].strip()]


def _get(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {_shown(value)}; expected an object with {key!r}")
    if key not in value:
        keys = ", ".join(map(repr, value)) or "no keys"
        raise DataError(f"{where} has no {key!r}, but {keys:.200}.{did_you_mean(key, value)}")
    return value[key]


def _text(value: Any, key: str, where: str) -> str:
    text = _get(value, key, where)
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is {_shown(text)}; expected a text")
    return text


def _identifier(value: Any, key: str, where: str) -> str:
    name = _get(value, key, where)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"{where}: {key!r} is {_shown(name)}; expected a text or a whole number")
    return str(name)


def _items(value: Any, key: str, where: str, path: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yields the items of a list under `key`, each with its place in the structure."""
    items = _get(value, key, where)
    if not isinstance(items, list):
        raise DataError(f"{where}: {key!r} is {_shown(items)}; expected a list")
    for place, item in enumerate(items):
        yield f"{path or f'{where}.{key}'}[{place}]", item


def _optional_items(value: dict[str, Any], key: str, where: str) -> Iterator[tuple[str, Any]]:
    """As `_items`; none where there is no such key, or null."""
    return iter(()) if value.get(key) is None else _items(value, key, where)


def _texts(value: Any, key: str, where: str, *, required: bool = False) -> list[str]:
    found = _items(value, key, where) if required else _optional_items(value, key, where)
    texts = []
    for inner, text in found:
        if not isinstance(text, str):
            raise DataError(f"{inner} is {_shown(text)}; expected a text")
        texts.append(text)
    return texts


def _shown(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.60}"
