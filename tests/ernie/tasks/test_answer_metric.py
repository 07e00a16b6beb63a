"""Answers to whole raw examples, from windows that come in any order, on any rank."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from ernie.tasks.answer_metric import AnswerMetric, with_answer_columns
from propeller.data import pad_batch
from propeller.errors import DataError


class Digits:
    """A task that adds up the digits of a text, two to a window."""

    def windows(self, raws):
        return [
            with_answer_columns(
                raw,
                [
                    {"digits": np.array([int(digit) for digit in raw["text"][start : start + 2]], np.int64)}
                    for start in range(0, len(raw["text"]), 2)
                ],
            )
            for raw in raws
        ]

    def finish(self, outputs):
        return [{"sum": float(value)} for value in outputs["sums"]]

    def join(self, raw, examples, parts):
        assert len(examples) == len(parts)
        return {"sum": sum(part["sum"] for part in parts)}


def score(raws, answers):
    right = [sum(map(int, raw["text"])) == answer["sum"] for raw, answer in zip(raws, answers, strict=True)]
    return {"right": float(np.mean(right)) if right else float("nan"), "answers": float(len(right))}


TEXTS = ["123", "7", "98765", "123", "4444", "11"]


def batches(texts, size=2, seed=0):
    """The windows of all texts, shuffled, as a model's outputs and the columns beside them."""
    rows = [row for windows in Digits().windows([{"text": text} for text in texts]) for row in windows]
    random.Random(seed).shuffle(rows)
    for start in range(0, len(rows), size):
        columns = pad_batch(rows[start : start + size])
        yield {"sums": columns["digits"].sum(axis=1)}, columns


def metric():
    return AnswerMetric(Digits(), score)


@pytest.mark.parametrize("seed", range(5))
def test_answers_of_shuffled_windows(seed):
    one = metric()
    for outputs, columns in batches(TEXTS, seed=seed):
        one.update(outputs, None, columns)
    assert one.compute() == {"right": 1.0, "answers": len(TEXTS)}


def test_windows_on_several_ranks():
    ranks = [metric(), metric(), metric()]
    for place, (outputs, columns) in enumerate(batches(TEXTS, size=1)):
        ranks[place % 3].update(outputs, None, columns)
    whole = metric()
    for one in ranks:
        whole.merge(one.state())
    assert whole.compute() == {"right": 1.0, "answers": len(TEXTS)}
    assert whole.state()["answers"].ndim == 1


def test_a_wrong_answer_shows():
    one = metric()
    for place, (outputs, columns) in enumerate(batches(["12", "34"], size=1)):
        one.update({"sums": outputs["sums"] + place}, None, columns)
    assert one.compute()["right"] == 0.5


def test_what_was_not_seen_as_a_whole_does_not_count():
    one = metric()
    rows = Digits().windows([{"text": "1234"}, {"text": "5"}])
    columns = pad_batch([rows[0][1], rows[1][0]])
    one.update({"sums": columns["digits"].sum(axis=1)}, None, columns)
    assert one.answers() == ([{"text": "5"}], [{"sum": 5.0}])
    assert [row["raw"] for row in rows[0]] == ['{"text": "1234"}', ""]
    one.reset()
    assert np.isnan(one.compute()["right"])


def test_texts_that_no_utf8_can_hold_cross_ranks():
    lone = SimpleNamespace(finish=lambda outputs: [{}])
    one, other = AnswerMetric(lone, score), AnswerMetric(lone, score)
    (columns,) = with_answer_columns({"text": "\ud800"}, [{}])
    one.update({}, None, {name: [value] for name, value in columns.items()})
    other.merge(one.state())
    assert other.state()["answers"].tobytes() == one.state()["answers"].tobytes()
    assert json.loads(columns["raw"]) == {"text": "\ud800"}


def test_rows_that_do_not_fit():
    outputs, columns = next(batches(["1234"]))
    with pytest.raises(DataError, match="1 parts of answers for 2 rows"):
        metric().update({"sums": outputs["sums"][:1]}, None, columns)
