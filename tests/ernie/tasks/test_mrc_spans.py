"""The search for an answer over windows, beside a plain search through everything."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ernie.tasks.mrc_spans import SpanSearch, Window
from propeller.errors import ConfigError, DataError

QUESTION = 3  # tokens before the context: [CLS], one of the question, [SEP]


def text_of(rng, size):
    """A text of `size` one-character tokens with blanks between, and their offsets."""
    context = " ".join(rng.choice(list("abcde猫"), size))
    return context, np.array([[2 * place, 2 * place + 1] for place in range(size)]).reshape(-1, 2)


def cut(offsets, room, stride):
    """Windows over a context, and how long they are."""
    windows, size = [], len(offsets)
    for first in range(0, max(1, size), stride):
        piece = offsets[first : first + room]
        framed = np.concatenate([np.zeros((QUESTION, 2)), piece.reshape(-1, 2), np.zeros((1, 2))])
        windows.append(Window(first, QUESTION, framed.astype(np.int32)))
        if first + room >= size:
            break
    return windows


def logits_for(rng, windows, scale=3.0):
    """Random logits of start and end for each window, in which the question would win."""
    rows = []
    for window in windows:
        row = rng.normal(size=(2, len(window.offsets))).astype(np.float32) * scale
        row[:, 1:QUESTION] += 50
        row[:, -1] += 50
        rows.append(row)
    return rows


def run(search, context, windows, rows):
    """Each window runs in a padded batch of two, as beside a longer neighbour."""
    parts = []
    for window, row in zip(windows, rows, strict=True):
        size = len(window.offsets)
        padded = np.full((2, 2, size + 4), 99, np.float32)
        padded[:, 0, :size] = row
        in_context = np.zeros((2, size + 4), np.int64)
        in_context[0, QUESTION : size - 1] = 1
        in_context[1, QUESTION:] = 1
        parts.append(search.parts(padded[0], padded[1], in_context)[0])
    return search.answer(context, windows, json.loads(json.dumps(parts)))


def owner(windows, token):
    """The window in which a token has most context, as BERT counts it."""
    scores = [
        min(token - window.first, window.first + window.length - 1 - token) + 0.01 * window.length
        if window.first <= token < window.first + window.length
        else -np.inf
        for window in windows
    ]
    return int(np.argmax(scores))


def all_spans(context, windows, rows, max_answer_length):
    """Every valid span, best first: `(score, text)`."""
    found = []
    for number, (window, row) in enumerate(zip(windows, rows, strict=True)):
        for start in range(QUESTION, QUESTION + window.length):
            if owner(windows, start - QUESTION + window.first) != number:
                continue
            for end in range(start, min(start + max_answer_length, QUESTION + window.length)):
                text = context[window.offsets[start, 0] : window.offsets[end, 1]]
                found.append((float(row[0, start]) + float(row[1, end]), text))
    return sorted(found, key=lambda span: -span[0])


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("with_negative", [False, True])
def test_best_answers_are_those_of_a_search_through_everything(seed, with_negative):
    rng = np.random.default_rng(seed)
    context, offsets = text_of(rng, int(rng.integers(1, 40)))
    windows = cut(offsets, room=12, stride=int(rng.integers(3, 13)))
    rows = logits_for(rng, windows)
    search = SpanSearch(n_best_size=20, max_answer_length=4, with_negative=with_negative)
    answer = run(search, context, windows, rows)
    expected: dict[str, float] = {}
    for score, text in all_spans(context, windows, rows, 4):
        expected.setdefault(text, score)
    null = min(float(row[0, 0]) + float(row[1, 0]) for row in rows)
    best = max(expected.values())
    assert answer["null_odds"] == pytest.approx(null - best)
    texts = [text for text, _ in list(expected.items())[:20]]
    assert (answer["text"] == "") == (with_negative and null > best)
    assert answer["text"] in ("", texts[0])
    if with_negative:
        place = sum(score >= null for score in list(expected.values())[:20])
        texts = texts[: 20 if place == 20 else 19]
        texts.insert(place, "")
    assert [entry["text"] for entry in answer["nbest"]] == texts
    scores = np.array([null if text == "" else expected[text] for text in texts])
    probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    np.testing.assert_allclose([entry["probability"] for entry in answer["nbest"]], probabilities, rtol=1e-6)


def test_every_answer_is_a_piece_of_its_context_at_the_place_it_names():
    rng = np.random.default_rng(7)
    for _ in range(1000):
        size = int(rng.integers(0, 30))
        context, offsets = text_of(rng, size)
        # Tokens that begin or end with a blank, or have no width, as SentencePiece may give.
        offsets = np.clip(offsets + rng.integers(-1, 2, offsets.shape), 0, len(context))
        offsets[:, 1] = np.maximum(offsets[:, 0], offsets[:, 1])
        windows = cut(offsets, room=9, stride=int(rng.integers(1, 10)))
        search = SpanSearch(
            n_best_size=int(rng.integers(1, 6)),
            max_answer_length=int(rng.integers(1, 12)),
            with_negative=bool(rng.integers(2)),
        )
        answer = run(search, context, windows, logits_for(rng, windows, scale=rng.choice([0.0, 1.0, 9.0])))
        assert context[answer["start"] : answer["end"]] == answer["text"] == answer["text"].strip()
        for entry in answer["nbest"]:
            assert context[entry["start"] : entry["end"]] == entry["text"]
        texts = [entry["text"] for entry in answer["nbest"]]
        assert len(texts) == len(set(texts)) <= search.n_best_size + 1
        probabilities = [entry["probability"] for entry in answer["nbest"]]
        assert sum(probabilities) == pytest.approx(1) and probabilities == sorted(probabilities, reverse=True)
        assert answer["score"] == next(
            e["probability"] for e in answer["nbest"] if e["text"] == answer["text"]
        )
        json.dumps(answer, allow_nan=False)


class TestNoAnswer:
    CONTEXT = "a b"

    def run(self, null, **search):
        """The best answer, `b`, scores 2; no answer scores `null`, in the better of two windows."""
        offsets = np.array([[0, 1], [2, 3]])
        (window,) = cut(offsets, room=2, stride=2)
        row = np.array([[null / 2, 0, 0, 0, 1, 0], [null / 2, 0, 0, 0.5, 1, 0]], np.float32)
        other = row + np.array([[5], [5]], np.float32) * (np.arange(6) == 0)
        return run(SpanSearch(**search), self.CONTEXT, [window, window._replace(first=0)], [row, other])

    def test_smallest_score_of_the_windows_counts(self):
        assert self.run(3.0, with_negative=True)["null_odds"] == pytest.approx(1)

    @pytest.mark.parametrize(("threshold", "text"), [(0.0, ""), (0.9, ""), (1.1, "b")])
    def test_threshold_decides(self, threshold, text):
        answer = self.run(3.0, with_negative=True, null_score_diff_threshold=threshold)
        assert answer["text"] == text
        assert [entry["text"] for entry in answer["nbest"]][:2] == ["", "b"]
        assert answer["score"] == answer["nbest"][0 if text == "" else 1]["probability"]
        undecided = self.run(3.0, with_negative=True)
        assert undecided["text"] == "", "as with a threshold of 0"
        search = SpanSearch(with_negative=True, null_score_diff_threshold=threshold)
        assert search.choose(undecided) == answer

    def test_is_no_choice_where_every_question_has_one(self):
        answer = self.run(3.0)
        assert answer["text"] == "b" and "" not in [entry["text"] for entry in answer["nbest"]]
        assert answer["null_odds"] == pytest.approx(1)

    def test_a_text_stays_among_the_best(self):
        answer = self.run(3.0, with_negative=True, n_best_size=1)
        assert [entry["text"] for entry in answer["nbest"]] == ["", "b"]
        assert SpanSearch(with_negative=True, null_score_diff_threshold=2.0).choose(answer)["text"] == "b"

    @pytest.mark.parametrize("with_negative", [True, False])
    def test_empty_context(self, with_negative):
        (window,) = cut(np.zeros((0, 2)), room=4, stride=4)
        row = np.array([[2, 9, 9, 9], [3, 9, 9, 9]], np.float32)
        answer = run(SpanSearch(with_negative=with_negative), "", [window], [row])
        assert (answer["text"], answer["start"], answer["end"], answer["score"]) == ("", 0, 0, 1.0)
        assert answer["null_odds"] == 5.0
        assert SpanSearch(with_negative=with_negative, null_score_diff_threshold=9.0).choose(answer) == answer
        assert answer["nbest"] == [
            {"text": "", "start": 0, "end": 0, "start_logit": 2.0, "end_logit": 3.0, "probability": 1.0}
        ]


def test_there_is_an_answer_where_the_best_starts_stand_behind_the_best_ends():
    size = 10
    context, offsets = text_of(np.random.default_rng(0), size)
    (window,) = cut(offsets, room=size, stride=size)
    row = np.zeros((2, size + QUESTION + 1), np.float32)
    row[0, QUESTION : QUESTION + size] = np.arange(size)
    row[1, QUESTION : QUESTION + size] = -3 * np.arange(size)
    answer = run(SpanSearch(n_best_size=2), context, [window], [row])
    assert (answer["start"], answer["end"]) == (0, 1)


def test_a_start_without_context_counts_only_if_there_is_no_other():
    context, offsets = text_of(np.random.default_rng(0), 6)
    windows = cut(offsets, room=4, stride=2)
    assert [owner(windows, token) for token in range(6)] == [0, 0, 0, 1, 1, 1]
    rows = [np.full((2, 8), -9, np.float32) for _ in windows]
    rows[0][0, QUESTION + 3] = rows[0][1, QUESTION + 3] = 5  # the last token of the first window
    rows[1][0, QUESTION] = rows[1][1, QUESTION] = 4  # the first of the second
    answer = run(SpanSearch(n_best_size=1, max_answer_length=1), context, windows, rows)
    assert answer["start"] == 6 and answer["nbest"][0]["start_logit"] == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_best_size", 0),
        ("n_best_size", 2.5),
        ("max_answer_length", 0),
        ("max_answer_length", True),
        ("null_score_diff_threshold", float("nan")),
        ("null_score_diff_threshold", "0"),
    ],
)
def test_wrong_settings(name, value):
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(SpanSearch(), **{name: value})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["start_logits", "end_logits"])
def test_logits_that_are_not_finite(name, value):
    logits = {name: np.zeros((1, 6), np.float32) for name in ("start_logits", "end_logits")}
    logits[name][0, 4] = value
    with pytest.raises(DataError, match="logits are not all finite"):
        SpanSearch().parts(**logits, in_context=np.array([[0, 0, 0, 1, 1, 0]]))
