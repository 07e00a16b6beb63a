"""The search for an answer: from the logits of a long text's windows to spans of its characters.

Source: `write_predictions` of google-research/bert's `run_squad.py`, `compute_predictions_logits` of
    Transformers' `squad_metrics.py`. The same spans win, with two differences: what cannot be an answer
    (question, special tokens, padding) takes no place among the best starts and ends, and the best span of
    every window is looked at even if its start or end is not among these. So an answer never scores lower
    than theirs, and there is one wherever the text has a token.

Shapes: B rows, S tokens of a row, T tokens of a row's piece of the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, DataError
from propeller.processor import Answer

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]


class Window(NamedTuple):
    """One model input over a piece of the context.

    Attributes:
        first: the context's token that its piece begins with, counted over the whole context.
        begin: the place of that token in the input.
        offsets: int32 `[S, 2]`; where each token begins and ends, in characters of the context; (0, 0)
            for what does not come from it.
    """

    first: int
    begin: int
    offsets: np.ndarray

    @property
    def length(self) -> int:
        """T; the input ends with a `[SEP]`."""
        return len(self.offsets) - self.begin - 1


class _Spans(NamedTuple):
    """Spans of one window or several: what they score, and their characters in the context."""

    start_logits: Floats
    end_logits: Floats
    begins: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class SpanSearch:
    """How answers are chosen.

    Args:
        n_best_size: starts and ends of a window that are tried with each other, and answers that are kept.
        max_answer_length: tokens of an answer at most.
        with_negative: whether a question may have no answer, as in SQuAD 2.0. The empty answer then stands
            among the best.
        null_score_diff_threshold: with `with_negative`, the answer is empty where its score exceeds the best
            other's by more than this. None, which counts as 0, leaves it to be found on dev.

    Raises:
        ConfigError: a size is no positive whole number, or the threshold no number.
    """

    n_best_size: int = 20
    max_answer_length: int = 30
    with_negative: bool = False
    null_score_diff_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("n_best_size", "max_answer_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        threshold = self.null_score_diff_threshold
        if threshold is not None and (type(threshold) not in (int, float) or not np.isfinite(threshold)):
            raise ConfigError(f"null_score_diff_threshold must be a finite number, got {threshold!r}.")

    def parts(self, start_logits: Floats, end_logits: Floats, in_context: Ints) -> list[Answer]:
        """Picks what `answer` needs of each row.

        Args:
            start_logits, end_logits: `[B, S]`.
            in_context: `[B, S]`, not 0 where a token belongs to the context.

        Returns:
            For each row `null` (the logits of its first token, which stand for no answer), and `starts`,
            `start_logits`, `ends`, `end_logits`: the places of the best, and what they score.

        Raises:
            DataError: a logit is NaN or infinite.
        """
        if not (np.isfinite(start_logits).all() and np.isfinite(end_logits).all()):
            raise DataError(
                "The model's logits are not all finite, so that no answer is the best. Its training has "
                "diverged: lower the learning rate, or take another checkpoint."
            )
        eligible = np.asarray(in_context) > 0
        starts = np.where(eligible, start_logits, -np.inf)
        ends = np.where(eligible, end_logits, -np.inf)
        best_starts, best_ends = self._best_spans(starts, ends)
        size = self.n_best_size
        start_orders = np.argsort(-starts, axis=-1, kind="stable")[:, :size]
        end_orders = np.argsort(-ends, axis=-1, kind="stable")[:, :size]
        parts = []
        for row, count in enumerate(eligible.sum(axis=-1).tolist()):
            part: Answer = {"null": [float(start_logits[row, 0]), float(end_logits[row, 0])]}
            for name, logits, order, best in (
                ("start", starts, start_orders, best_starts),
                ("end", ends, end_orders, best_ends),
            ):
                places = order[row, :count].tolist()
                if count and best[row] not in places:
                    places.append(int(best[row]))
                part[f"{name}s"] = places
                part[f"{name}_logits"] = logits[row, places].tolist()
            parts.append(part)
        return parts

    def _best_spans(self, starts: Floats, ends: Floats) -> tuple[Ints, Ints]:
        """First and last token of the best span of each row, `[B]` each."""
        length = starts.shape[1]
        best = np.full(len(starts), -np.inf)
        first, last = np.zeros((2, len(starts)), dtype=np.int64)
        for distance in range(min(self.max_answer_length, length)):
            scores = starts[:, : length - distance] + ends[:, distance:]
            places = scores.argmax(axis=-1)
            found = scores[np.arange(len(scores)), places]
            better = found > best
            best[better] = found[better]
            first[better] = places[better]
            last[better] = places[better] + distance
        return first, last

    def answer(self, context: str, windows: Sequence[Window], parts: Sequence[Mapping[str, Any]]) -> Answer:
        """Chooses the answer over all windows of a context.

        A token that stands in several windows may begin an answer only in that where it has most context on
        both sides, as in BERT; only if that leaves no span at all, in any.

        Args:
            context: the whole text.
            windows: in order.
            parts: what `parts` picked of each window's row.

        Returns:
            `text`, `start` and `end` in characters of the context (`context[start:end] == text`; all empty
            for no answer), `score`: its probability among the best; `null_odds`: the score of no answer, the
            smallest of the windows', less that of the best answer; `nbest`: the best answers of unlike text,
            each with `text`, `start`, `end`, `probability`, `start_logit`, `end_logit`. Where the context
            has no token, the empty answer is the only one, and counted against a score of 0.
        """
        null = min((part["null"] for part in parts), key=sum)
        empty = {"text": "", "start": 0, "end": 0, "start_logit": null[0], "end_logit": null[1]}
        found = self._distinct(context, self._spans(windows, parts))
        null_odds = sum(null) - (_score(found[0]) if found else 0.0)
        nbest = found[: self.n_best_size]
        if self.with_negative or not found:
            place = sum(_score(entry) >= _score(empty) for entry in nbest)
            if place < self.n_best_size:
                nbest = nbest[: max(1, self.n_best_size - 1)]  # threshold searches need one with a text
            nbest.insert(place, empty)
        scores = np.array([_score(entry) for entry in nbest])
        exponents = np.exp(scores - scores.max())
        for entry, probability in zip(nbest, (exponents / exponents.sum()).tolist(), strict=True):
            entry["probability"] = probability
        return self.choose({"null_odds": null_odds, "nbest": nbest})

    def choose(self, answer: Mapping[str, Any]) -> Answer:
        """Chooses by `null_score_diff_threshold` between the best text and no answer.

        Args:
            answer: `null_odds` and `nbest` of one, also of a search with another threshold.

        Returns:
            See `answer`.
        """
        null_odds, nbest = answer["null_odds"], answer["nbest"]
        is_null = self.with_negative and null_odds > (self.null_score_diff_threshold or 0.0)
        chosen = next((entry for entry in nbest if is_null == (not entry["text"])), nbest[0])
        return {
            "text": chosen["text"],
            "start": chosen["start"],
            "end": chosen["end"],
            "score": chosen["probability"],
            "null_odds": null_odds,
            "nbest": nbest,
        }

    def _spans(self, windows: Sequence[Window], parts: Sequence[Mapping[str, Any]]) -> _Spans:
        """All spans that the parts allow."""
        owners = _owners(windows)
        own, others = [], []
        for number, (window, part) in enumerate(zip(windows, parts, strict=True)):
            starts, ends = np.array(part["starts"], dtype=np.int64), np.array(part["ends"], dtype=np.int64)
            distances = ends[None, :] - starts[:, None]
            rows, columns = np.nonzero((distances >= 0) & (distances < self.max_answer_length))
            spans = _Spans(
                np.array(part["start_logits"], dtype=np.float64)[rows],
                np.array(part["end_logits"], dtype=np.float64)[columns],
                window.offsets[starts[rows], 0],
                window.offsets[ends[columns], 1],
            )
            is_own = owners[starts[rows] - window.begin + window.first] == number
            own.append(_Spans(*(array[is_own] for array in spans)))
            others.append(_Spans(*(array[~is_own] for array in spans)))
        chosen = own if any(len(spans.begins) for spans in own) else others
        return _Spans(*map(np.concatenate, zip(*chosen, strict=True)))

    def _distinct(self, context: str, spans: _Spans) -> list[dict[str, Any]]:
        """The best `n_best_size` texts, best first, without blanks around them."""
        found: dict[str, dict[str, Any]] = {}
        for place in np.argsort(-(spans.start_logits + spans.end_logits), kind="stable"):
            start, end = int(spans.begins[place]), int(spans.ends[place])
            text = context[start:end].rstrip()
            end = start + len(text)
            text = text.lstrip()
            start = end - len(text)
            if text and text not in found:
                found[text] = {
                    "text": text,
                    "start": start,
                    "end": end,
                    "start_logit": float(spans.start_logits[place]),
                    "end_logit": float(spans.end_logits[place]),
                }
                if len(found) == self.n_best_size:
                    break
        return list(found.values())


def _score(entry: Mapping[str, Any]) -> float:
    return float(entry["start_logit"] + entry["end_logit"])


def _owners(windows: Sequence[Window]) -> Ints:
    """For each token of the context the window in which it has most context; the first of equals.

    Source: `_check_is_max_context` of google-research/bert.
    """
    size = windows[-1].first + windows[-1].length
    owners = np.zeros(size, dtype=np.int64)
    if len(windows) == 1:
        return owners
    best = np.full(size, -np.inf)
    for number, window in enumerate(windows):
        places = np.arange(window.length)
        scores = np.minimum(places, places[::-1]) + 0.01 * window.length
        piece = slice(window.first, window.first + window.length)
        better = scores > best[piece]
        owners[piece][better] = number
        best[piece][better] = scores[better]
    return owners
