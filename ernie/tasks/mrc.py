"""Reading comprehension: a question and a text in, the span of the text that answers it out; without Paddle.

A text that is longer than the model is read in windows, `[CLS] question [SEP] piece [SEP]` each, which begin
every `doc_stride` tokens.

Source: Devlin et al. 2019 (BERT), sections 4.2 and 4.3; `convert_examples_to_features` in `run_squad.py` of
    google-research/bert. Transformers' `run_qa.py` and its tokenizers count otherwise: their `stride` is how
    much two windows share. Where a window has room for R tokens of the text, `stride = R - doc_stride`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ernie.encoding import Pieces
from ernie.tasks.answer_metric import AnswerMetric, with_answer_columns
from ernie.tasks.mrc_files import read_mrc
from ernie.tasks.mrc_scores import cmrc_scores, squad_scores
from ernie.tasks.mrc_spans import SpanSearch, Window
from ernie.tasks.processor import TextProcessor
from ernie.tokenizing import Tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError, did_you_mean
from propeller.metrics import Metric
from propeller.processor import Answer, Raw, register_processor

SCORES = ("squad", "cmrc")

_SPECIAL_TOKENS = 3
# Columns that only `join` needs.
_PLACES = ("first_token", "context_begin", "offsets")
_BLANKS = re.compile(r"\s+")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Characters of Chinese and Japanese, and letters of whatever script.
_CHINESE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_LETTERS = re.compile(r"[^\W\d_]")


# The label of a window of which it is not known where the answer stands: it has no loss.
IGNORED = -1
_NOWHERE = -1


class _Gold(NamedTuple):
    """Where an answer stands in its context.

    Attributes:
        first, last: its tokens.
        otherwise: the label of a window that does not hold all of it.
    """

    first: int
    last: int
    otherwise: int


@register_processor
class MrcProcessor(TextProcessor):
    """Questions with their texts in, answers cut out of the texts out.

    A raw example has `question` and `context` (or `text_a` and `text_b`); labelled ones, of which the answers
    are known, `answers` (`[{"text", "answer_start"}]`), `is_impossible`, and `id` as well.

    Args:
        tokenizer: the model's tokenizer.
        max_seqlen: tokens of a window at most, special ones included.
        doc_stride: tokens of the context between the beginnings of two windows; never more than a window has
            room for, so that none is left out.
        max_query_length: tokens that a question is cut to.
        search: how answers are chosen: a `SpanSearch`, or its fields by name.
        score: `squad` (words) or `cmrc` (characters), whose definition of a right answer counts.

    Raises:
        ConfigError: a value that cannot be used, or no room for a token of the context.
    """

    name = "mrc"
    label_names = ("start_position", "end_position")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_seqlen: int,
        doc_stride: int = 128,
        max_query_length: int = 64,
        search: SpanSearch | Mapping[str, Any] | None = None,
        score: str = "squad",
    ):
        super().__init__(tokenizer, max_seqlen=max_seqlen)
        for name, value in (("doc_stride", doc_stride), ("max_query_length", max_query_length)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if max_seqlen <= max_query_length + _SPECIAL_TOKENS:
            raise ConfigError(
                f"max_seqlen {max_seqlen} leaves no room for the text beside a question of max_query_length "
                f"{max_query_length} and {_SPECIAL_TOKENS} special tokens: set it to "
                f"{max_query_length + _SPECIAL_TOKENS + 1} or more, 384 for example."
            )
        if score not in SCORES:
            raise ConfigError(
                f"There is no score {score!r}.{did_you_mean(str(score), SCORES)} Known: {', '.join(SCORES)}."
            )
        self.doc_stride = doc_stride
        self.max_query_length = max_query_length
        self.search = search if isinstance(search, SpanSearch) else SpanSearch(**(search or {}))
        self.score = score

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "max_seqlen": self.max_seqlen,
            "doc_stride": self.doc_stride,
            "max_query_length": self.max_query_length,
            "search": dataclasses.asdict(self.search),
            "score": self.score,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """As any task's, with each field of the search by itself: what differs is named."""
        fields = {name: value for name, value in super().identity.items() if name != "search"}
        return {**fields, **dataclasses.asdict(self.search)}

    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Tokenises a batch into windows, for training and evaluation.

        Returns:
            The windows of all examples, one after the other: `input_ids` and `token_type_ids` (int64
            `[seq_len]`); of labelled examples also what `AnswerMetric` needs, and `start_position` and
            `end_position`: the first and last token of the first answer that has a place; both 0, which is
            `[CLS]`, where the window does not hold all of it, and `IGNORED` where no answer has a place
            (`answer_start` -1). A token that holds a part of the answer belongs to it.

        Raises:
            DataError: as `windows`, or an answer does not stand in its context at the place that it names.
        """
        prepared = []
        for raw, windows in zip(raws, self._windows(raws, labelled=True), strict=True):
            examples = [{name: window[name] for name in window if name not in _PLACES} for window in windows]
            is_for_metrics = self.label_names[0] in windows[0]
            prepared += with_answer_columns(raw, examples) if is_for_metrics else examples
        return prepared

    def windows(self, raws: Sequence[Raw]) -> list[list[dict[str, Any]]]:
        """Tokenises a batch into the windows of each example. Answers that they may have are not looked at.

        Returns:
            For each window `input_ids` and `token_type_ids` (int64 `[seq_len]`); `first_token`,
            `context_begin` and `offsets`, see `Window`.

        Raises:
            DataError: an example lacks its question or context, or they are no strings.
        """
        return self._windows(raws, labelled=False)

    def _windows(self, raws: Sequence[Raw], *, labelled: bool) -> list[list[dict[str, Any]]]:
        """The windows of each example, with labels where it has some and they are asked for."""
        questions, contexts = map(list, zip(*map(_texts, raws), strict=True)) if raws else ([], [])
        asked = self.tokenizer.pieces(questions)
        places = {text: place for place, text in enumerate(dict.fromkeys(contexts))}
        read = self.tokenizer.pieces(list(places))  # each text once, however many questions there are to it
        found = []
        for number, (raw, context) in enumerate(zip(raws, contexts, strict=True)):
            question, _ = _row(asked, number)
            ids, offsets = _row(read, places[context])
            gold = _gold(raw, context, offsets) if labelled else None
            found.append(self._cut(question[: self.max_query_length], ids, offsets, gold))
        return found

    def _cut(
        self, question: np.ndarray, ids: np.ndarray, offsets: np.ndarray, gold: _Gold | None
    ) -> list[dict[str, Any]]:
        """The windows of one example.

        Args:
            question: ids.
            ids, offsets: the context's tokens.
            gold: its answer; None leaves the labels out.
        """
        tokenizer = self.tokenizer
        begin = len(question) + 2
        room = self.max_seqlen - len(question) - _SPECIAL_TOKENS
        windows = []
        for first in range(0, max(1, len(ids) - room + self._step(room)), self._step(room)):
            length = min(room, len(ids) - first)
            piece = slice(first, first + length)
            end = begin + length
            input_ids = np.empty(end + 1, dtype=np.int64)
            input_ids[0] = tokenizer.cls_token_id
            input_ids[1 : begin - 1] = question
            input_ids[begin - 1] = input_ids[end] = tokenizer.sep_token_id
            input_ids[begin:end] = ids[piece]
            token_type_ids = np.zeros(end + 1, dtype=np.int64)
            token_type_ids[begin:] = 1
            own_offsets = np.zeros((end + 1, 2), dtype=np.int32)
            own_offsets[begin:end] = offsets[piece]
            window = {
                "input_ids": input_ids,
                "token_type_ids": token_type_ids,
                "first_token": first,
                "context_begin": begin,
                "offsets": own_offsets,
            }
            if gold is not None:
                is_inside = first <= gold.first and gold.last < first + length
                for name, token in zip(self.label_names, gold[:2], strict=True):
                    window[name] = token - first + begin if is_inside else gold.otherwise
            windows.append(window)
        return windows

    def _step(self, room: int) -> int:
        return min(self.doc_stride, room)

    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """Picks of each window what `join` chooses from; see `SpanSearch.parts`."""
        return self.search.parts(
            np.asarray(outputs["start_logits"], dtype=np.float32),
            np.asarray(outputs["end_logits"], dtype=np.float32),
            np.asarray(outputs["in_context"]),
        )

    def join(self, raw: Raw, examples: Sequence[Mapping[str, Any]], parts: Sequence[Answer]) -> Answer:
        """Chooses the answer over all windows; see `SpanSearch.answer`."""
        windows = [Window(*(example[name] for name in _PLACES)) for example in examples]
        return self.search.answer(_texts(raw)[1], windows, parts)

    def read(self, path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
        """Reads a file of SQuAD, CMRC2018, DRCD or DuReader; see `read_mrc`.

        Raises:
            ConfigError: `columns` are named, but it is no table.
        """
        if columns:
            raise ConfigError(
                f"The columns {', '.join(columns)} are named, but the files of {self.name} are JSON: leave "
                "--columns out."
            )
        return read_mrc(path)

    def parse(self, line: str) -> Raw:
        """Reads a JSON object with `question` and `context`, or `question<TAB>context`."""
        if line.startswith("{"):
            try:
                raw = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"expected a JSON object, since it begins with {{: {error}") from None
            return {name: _SURROGATES.sub("\ufffd", text) if isinstance(text, str) else text
                    for name, text in raw.items()}  # fmt: skip  # half a character cannot be written again
        cells = line.split("\t")
        if len(cells) != 2:
            raise DataError(f"expected question<TAB>context, or a JSON object, found {len(cells)} cells")
        return {"question": cells[0], "context": cells[1]}

    def format(self, raw: Raw, answer: Answer) -> str:
        """Writes the text of the answer on one line; an empty line is no answer."""
        return _BLANKS.sub(" ", answer["text"])

    def metrics(self) -> dict[str, Metric]:
        return {self.score: AnswerMetric(self, self.scores)}

    def scores(self, raws: Sequence[Raw], answers: Sequence[Answer]) -> dict[str, float]:
        """What answers are worth by `score`, in percent; questions whose answer nobody gave do not count.

        Returns:
            See `cmrc_scores`, or `squad_scores`; where a question may have no answer `best_f1_thresh` and its
            like among them. Without any question `em`, `f1` and `best_metric` are `nan`.
        """
        rows = [(raw, answer) for raw, answer in zip(raws, answers, strict=True) if is_labelled(raw)]
        if not rows:
            return dict.fromkeys(("em", "f1", self.best_metric), math.nan)
        labelled = [raw for raw, _ in rows]
        if self.score == "cmrc" or not self.search.with_negative:
            score = cmrc_scores if self.score == "cmrc" else squad_scores
            return score(labelled, {raw["id"]: answer["text"] for raw, answer in rows})
        texts, null_odds = best_texts(labelled, [answer for _, answer in rows])
        return squad_scores(labelled, texts, null_odds, self.search.null_score_diff_threshold or 0.0)

    @property
    def seeks_null_threshold(self) -> bool:
        """Whether `null_score_diff_threshold` is still to be found, by the scores of SQuAD 2.0."""
        return (
            self.score == "squad"
            and self.search.with_negative
            and self.search.null_score_diff_threshold is None
        )

    def with_null_threshold(self, threshold: float) -> MrcProcessor:
        """The same with another `null_score_diff_threshold`."""
        search = dataclasses.replace(self.search, null_score_diff_threshold=threshold)
        return type(self)(self.tokenizer, **{**self.settings, "search": search})

    @property
    def best_metric(self) -> str:
        """`f1`, or `best_f1` while the threshold is to be found; with `cmrc` `avg`, the mean of `em` and it.

        With a threshold of 0 a good model whose scores for no answer are all too high looks like a bad one.
        """
        if self.score == "cmrc":
            return "avg"
        return "best_f1" if self.seeks_null_threshold else "f1"


def is_labelled(raw: Raw) -> bool:
    """Whether somebody answered the question, or said that there is no answer."""
    return bool(raw.get("is_impossible") or raw.get("answers"))


def is_trainable(raw: Raw) -> bool:
    """Whether it is known where the answer stands, or that there is none."""
    places = [answer["answer_start"] for answer in raw.get("answers", ())]
    return bool(raw.get("is_impossible")) or max(places, default=_NOWHERE) >= 0


def best_texts(raws: Sequence[Raw], answers: Sequence[Answer]) -> tuple[dict[str, str], dict[str, float]]:
    """The best text that is not empty (empty if there is none), and `null_odds`, by question id."""
    texts, null_odds = {}, {}
    for raw, answer in zip(raws, answers, strict=True):
        texts[raw["id"]] = next((entry["text"] for entry in answer["nbest"] if entry["text"]), "")
        null_odds[raw["id"]] = answer["null_odds"]
    return texts, null_odds


def is_chinese(raws: Iterable[Raw], *, sample: int = 100) -> bool:
    """Whether at least half of the letters in the texts of the first examples are Chinese."""
    chinese = letters = 0
    for raw in itertools.islice(raws, sample):
        for text in _texts(raw):
            chinese += len(_CHINESE.findall(text))
            letters += len(_LETTERS.findall(text))
    return 2 * chinese >= letters > 0


def _texts(raw: Raw) -> tuple[str, str]:
    """Question and context.

    Raises:
        DataError: one is missing, or no string.
    """
    texts = []
    for name, other in (("question", "text_a"), ("context", "text_b")):
        text = raw.get(name, raw.get(other))
        if not isinstance(text, str):
            found = "missing" if text is None else f"{text!r:.80}"
            raise DataError(f"The {name} is {found}; expected a string (here, or as {other}).")
        texts.append(text)
    return texts[0], texts[1]


def _row(pieces: Pieces, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and offsets of one text."""
    tokens = slice(*pieces.splits[number : number + 2].tolist())
    return pieces.ids[tokens], pieces.offsets[tokens]


def _gold(raw: Raw, context: str, offsets: np.ndarray) -> _Gold | None:
    """The first answer that has a place; None for an example without labels.

    Raises:
        DataError: it is no answer, or does not stand where it says.
    """
    if raw.get("is_impossible"):
        return _Gold(_NOWHERE, _NOWHERE, 0)
    if "answers" not in raw:
        return None
    try:
        answers = ((answer["text"], answer["answer_start"]) for answer in raw["answers"])
        text, start = next((answer for answer in answers if answer[1] >= 0), ("", _NOWHERE))
        end = operator.index(start) + len(text)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"The answers are {raw['answers']!r:.80}; expected a list of "
            f"{{'text': ..., 'answer_start': ...}} ({error!r})."
        ) from None
    if start == _NOWHERE:
        return _Gold(_NOWHERE, _NOWHERE, IGNORED)
    if context[start:end] != text:
        raise DataError(
            f"The answer {text!r:.80} does not stand at answer_start {start} of its context, where "
            f"{context[start:end]!r:.80} is. Correct answer_start, or remove the answer."
        )
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
    return _Gold(first, last, 0) if first <= last else _Gold(_NOWHERE, _NOWHERE, 0)
