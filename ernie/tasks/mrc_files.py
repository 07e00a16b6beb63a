"""Files of questions on texts: SQuAD 1.1 and 2.0, CMRC2018, DRCD, DuReader, Hugging Face's rows."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie.tasks.mrc_formats import NOWHERE, questions
from propeller.data import (
    Context,
    Dataset,
    Entries,
    Node,
    Origin,
    PathLike,
    Position,
    Signature,
    as_index,
    file_entry,
)
from propeller.errors import DataError

log = logging.getLogger("propeller")


@dataclasses.dataclass
class MrcReport:
    """What a file holds, and what was done about answers that do not stand where it says.

    Attributes:
        questions: all questions.
        impossible: those that are marked as having no answer.
        unlabelled: those without an answer that are not marked so, as in test sets.
        untrainable: those whose answers all have no place in the text: left out of training.
        answers: all answers.
        misplaced: answers whose text does not stand at their `answer_start`, or that have none (-1).
        repaired: of these, the ones whose text stands in the context exactly once; they got that place.
        ambiguous: of these, the ones whose text stands there more than once; they have no place now.
        absent: of these, the ones whose text does not stand there at all; they have no place now.
    """

    questions: int = 0
    impossible: int = 0
    unlabelled: int = 0
    untrainable: int = 0
    answers: int = 0
    misplaced: int = 0
    repaired: int = 0
    ambiguous: int = 0
    absent: int = 0

    def __str__(self) -> str:
        return (
            f"{self.misplaced} of {self.answers} answers do not stand at their answer_start: "
            f"{self.repaired} stand in their context exactly once and were set there, {self.ambiguous} stand "
            f"there more than once and {self.absent} not at all; {self.untrainable} of {self.questions} "
            "questions have no answer with a place, which training leaves out"
        )


def read_mrc(path: PathLike, *, mend: bool = True) -> Dataset:
    r"""Reads the questions of a file, plain or gzipped.

    The format is told by the content:

    - SQuAD 1.1 and 2.0, and what is written like it (CMRC2018, DRCD, DuReader-robust, DuReader-checklist):
      `{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text",
      "answer_start"}], "is_impossible"}]}]}]}`; `answers` and `is_impossible` may be missing.
    - CMRC2018 as it was first released: `[{"context_text", "qas": [{"query_id", "query_text", "answers":
      [text, ...]}]}]`.
    - DuReader, one question a line: `{"question_id", "question", "documents": [{"paragraphs": [...]}],
      "answers": [text, ...]}`, raw or preprocessed. The context is all paragraphs of all documents with
      `\n` between them. The answers are the spans that the preprocessing chose (`fake_answers`), then those
      that people wrote.
    - The rows of Hugging Face's data sets, one a line, in an array or under `data`: `{"id", "question",
      "context", "answers": {"text": [...], "answer_start": [...]}}`. Empty lists say that there is no answer.

    An answer that does not stand at its `answer_start` gets the place where its text stands, if that is
    one; else, and where the file says -1 or nothing and the text does not stand there once, it has no
    place. What was found goes to the log once, as a warning, and is what `mrc_report` returns.

    Args:
        path: the file.
        mend: whether that is done; otherwise answers are as the file has them, with -1 where that names no
            place.

    Returns:
        `{"id", "question", "context", "answers": [{"text", "answer_start"}], "is_impossible"}` for each
        question. `answer_start` counts characters of `context`, where the text of the answer stands; it is -1
        for an answer without a place: good for scoring, not for training. Without answers a question
        is impossible, or unlabelled. A context may be empty.

    Raises:
        DataError: when iterated: the file cannot be read, is cut short or of another structure, or a
            question id stands twice; it names the file with the line, or the place in the structure.
    """
    return Dataset(_MrcSource(Path(path), mend))


def mrc_report(path: PathLike) -> MrcReport:
    """Reads a file as `read_mrc` does, and counts.

    Raises:
        DataError: as `read_mrc`.
    """
    report = MrcReport()
    for _ in _raws(Path(path), report):
        pass
    return report


class _MrcSource(Node):
    """The questions of a file. Position: the number of questions seen."""

    def __init__(self, path: Path, mend: bool):
        self._path = path
        self._mend = mend
        self._reported = False

    def iterate(self, position: Position, context: Context) -> Entries:
        seen = as_index(position)
        report = MrcReport()
        for count, raw in enumerate(_raws(self._path, report if self._mend else None), 1):
            if count > seen:
                yield raw, count
        if report.misplaced and not self._reported:
            self._reported = True
            log.warning("%s: %s", self._path, report)

    def origin(self, position: Position, context: Context) -> Origin | None:
        return Origin(f"{self._path}, question", as_index(position))

    def signature(self) -> Signature:
        return [{"kind": "mrc", "mend": self._mend, "files": [file_entry(self._path)]}]


def _raws(path: Path, report: MrcReport | None) -> Iterator[dict[str, Any]]:
    """Yields the checked questions of a file; with a `report` it counts there and mends their answers."""
    places: dict[str, str] = {}
    for question in questions(path):
        where = question.where if question.line is None else f"line {question.line}"
        if question.id in places:
            raise DataError(
                f"the question id {question.id!r} stands twice, at {places[question.id]} and at {where}; "
                "expected each once",
                path=path,
                line=question.line,
            )
        places[question.id] = where
        if question.is_impossible and question.answers:
            raise DataError(
                f"{question.where} is marked as impossible and has the answer "
                f"{question.answers[0][0]!r:.80}; expected one of the two",
                path=path,
                line=question.line,
            )
        found = question.answers
        if report is not None:
            found = [(text, _place(question.context, text, start, report)) for text, start in found]
            report.questions += 1
            report.impossible += question.is_impossible
            report.unlabelled += not found and not question.is_impossible
            report.untrainable += bool(found) and all(start == NOWHERE for _, start in found)
        yield {
            "id": question.id,
            "question": question.question,
            "context": question.context,
            "answers": [{"text": text, "answer_start": start} for text, start in found],
            "is_impossible": question.is_impossible,
        }
    if not places:
        raise DataError("holds no question; expected at least one", path=path)


def _place(context: str, text: str, start: int, report: MrcReport) -> int:
    """Returns a place where an answer's text does stand, or none."""
    report.answers += 1
    if start < 0 or not context.startswith(text, start):
        report.misplaced += 1
        start = context.find(text)
        if start < 0:
            report.absent += 1
        elif context.find(text, start + 1) >= 0:
            report.ambiguous += 1
            start = NOWHERE
        else:
            report.repaired += 1
    return start
