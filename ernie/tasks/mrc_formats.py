"""Questions on texts as files have them; `mrc_files` checks and repairs them.

Places in a structure are written as `data[0].paragraphs[2].qas[1].answers[0]`.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ernie.tasks.json_files import decode, parse
from propeller.data import decode_line, open_text_file
from propeller.errors import DataError, did_you_mean

NOWHERE = -1

_EXPECTED = "expected a file as SQuAD, CMRC2018, DRCD, DuReader or Hugging Face have it"

_KINDS = ("paragraphs", "context_text", "question")
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
            # Unescaped, these keys stand in the first line of nothing else; a look costs less than parsing.
            is_dureader = b'"documents"' in head and b'"question_id"' in head
            is_flat = b'"context"' in head and b'"question"' in head and b'"paragraphs"' not in head
            if (is_dureader or is_flat) and head.removeprefix(_BOM).lstrip().startswith(b"{"):
                lines = itertools.chain([head.removeprefix(_BOM)], stream)
                yield from _lines(path, lines, _dureader_question if is_dureader else _flat_question)
                return
            content = head + stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be read: {error}", path=path) from error
    try:
        yield from _whole(parse(decode(content, path), path, expected=_EXPECTED))
    except DataError as error:
        raise error if error.path is not None else DataError(str(error), path=path) from error


def _lines(path: Path, lines: Iterable[bytes], read: Callable[[Any], Question]) -> Iterator[Question]:
    """Yields the questions of a file that has one a line."""
    for number, raw in enumerate(lines, 1):
        text = decode_line(raw, path, number)
        if not text.strip():
            continue
        record = parse(text, path, number)
        try:
            yield read(record)._replace(line=number)
        except DataError as error:
            raise DataError(str(error), path=path, line=number) from error


def _whole(root: Any) -> Iterator[Question]:
    """Yields the questions of a parsed file."""
    items: Iterable[tuple[str, Any]]
    if isinstance(root, list):
        items = ((f"[{place}]", item) for place, item in enumerate(root))
    else:
        items = _items(root, "data", "the file", "data")
    for where, item in items:
        if not isinstance(item, dict) or item.keys().isdisjoint(_KINDS):
            raise DataError(
                f"{where} is {_shown(item)}; expected an object with 'paragraphs', as SQuAD has it, "
                "'context_text' (CMRC2018), or 'id', 'question', 'context' and 'answers' (Hugging Face)"
            )
        if "paragraphs" in item:
            for inner, paragraph in _items(item, "paragraphs", where):
                context = _text(paragraph, "context", inner)
                for innermost, question in _items(paragraph, "qas", inner):
                    yield _squad_question(question, context, innermost)
        elif "context_text" in item:
            context = _text(item, "context_text", where)
            for inner, question in _items(item, "qas", where):
                yield _cmrc_question(question, context, inner)
        else:
            yield _flat_question(item, where)


def _flat_question(value: Any, where: str = "the question") -> Question:
    """A question beside its context, as the rows of Hugging Face's data sets have them."""
    question = _squad_question(value, _text(value, "context", where), where)
    # There SQuAD 2.0 writes no answer as empty lists. In a test set the key is missing, or null.
    no_answer = value.get("answers") is not None and "is_impossible" not in value and not question.answers
    return question._replace(is_impossible=question.is_impossible or no_answer)


def _squad_question(value: Any, context: str, where: str) -> Question:
    name = _identifier(value, "id", where)
    where = f"{where} (id {name!r})"
    impossible = value.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise DataError(f"{where}: 'is_impossible' is {impossible!r:.80}; expected true or false")
    answers = []
    for inner, answer in _answers(value, where):
        text, start = _text(answer, "text", inner), _get(answer, "answer_start", inner)
        if not isinstance(start, int) or isinstance(start, bool):
            raise DataError(f"{inner}: 'answer_start' is {start!r:.80}; expected a whole number")
        answers.append((text, start))
    return Question(
        where, None, name, _text(value, "question", where), context, _not_blank(answers), impossible
    )


def _answers(value: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """Yields answers with their places: of a list of objects, or, as Hugging Face has it, of two lists."""
    answers = value.get("answers")
    if not isinstance(answers, dict):
        yield from _optional_items(value, "answers", where)
        return
    inner = f"{where}.answers"
    texts = _texts(answers, "text", inner, required=True)
    starts = [start for _, start in _items(answers, "answer_start", inner)]
    if len(starts) != len(texts):
        raise DataError(
            f"{inner}: 'answer_start' has {len(starts)} items and 'text' {len(texts)}; expected as many"
        )
    for place, (text, start) in enumerate(zip(texts, starts, strict=True)):
        yield f"{inner}[{place}]", {"text": text, "answer_start": start}


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
