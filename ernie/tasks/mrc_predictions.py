"""Answers to a whole file of questions, in the files that the official scripts read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from propeller import atomic
from propeller.errors import DataError, PropellerError
from propeller.processor import Answer, Raw

if TYPE_CHECKING:
    from ernie.tasks.mrc import MrcProcessor
    from propeller.paddle.inference import Predictor

log = logging.getLogger("ernie")

PREDICTIONS, NBEST, NULL_ODDS = "predictions.json", "nbest_predictions.json", "null_odds.json"

_NBEST_KEYS = ("text", "probability", "start_logit", "end_logit")
_SURROGATES = re.compile("[\ud800-\udfff]")


def answer_questions(predictor: Predictor, processor: MrcProcessor, raws: Iterable[Raw]) -> list[Answer]:
    """Answers questions by an exported model, in order.

    Raises:
        DataError: a question cannot be answered; it is named.
    """
    from propeller.paddle.stream import answer_stream

    raws = list(raws)
    answers = []
    for raw, answer in zip(raws, answer_stream(predictor, processor, raws), strict=True):
        if isinstance(answer, PropellerError):
            raise DataError(f"The question with the id {raw['id']!r} cannot be answered: {answer}")
        answers.append(answer)
    return answers


def write_predictions(folder: Path, raws: Sequence[Raw], answers: Sequence[Answer]) -> None:
    """Writes the three files of BERT's `run_squad.py`, each by question id, in the order of the questions.

    - `predictions.json`: the text of the answer, empty for none;
    - `nbest_predictions.json`: the best answers, each with `text`, `probability`, `start_logit`, `end_logit`;
    - `null_odds.json`: the score of no answer less that of the best answer.

    Args:
        folder: made if it is not there; files of these names are replaced.
        raws: questions with an `id`.
        answers: see `SpanSearch.answer`; one for each question.

    Raises:
        DataError: a file cannot be written.
    """
    rows = [(raw["id"], answer) for raw, answer in zip(raws, answers, strict=True)]
    contents: dict[str, Mapping[str, Any]] = {
        PREDICTIONS: {name: answer["text"] for name, answer in rows},
        NBEST: {
            name: [{key: entry[key] for key in _NBEST_KEYS} for entry in answer["nbest"]]
            for name, answer in rows
        },
        NULL_ODDS: {name: answer["null_odds"] for name, answer in rows},
    }
    for name, content in contents.items():
        text = atomic.to_json(content, indent=4) + "\n"
        try:
            # A text may hold half a character, which only an escape can stand for.
            atomic.write_text(folder / name, _SURROGATES.sub(lambda half: json.dumps(half[0])[1:-1], text))
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", path=folder / name) from error
    log.info("wrote %s of %d questions to %s", ", ".join(contents), len(rows), folder)
