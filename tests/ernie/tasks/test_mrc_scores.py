"""Scores of answers, against the definitions of SQuAD and CMRC2018 and what their scripts give."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie.tasks.mrc_files import read_mrc
from ernie.tasks.mrc_scores import cmrc_scores, find_null_threshold, squad_scores
from propeller.errors import ConfigError, DataError


def raw(name, *texts, is_impossible=False):
    answers = [{"text": text, "answer_start": -1} for text in texts]
    return {"id": name, "answers": answers, "is_impossible": is_impossible}


@pytest.fixture(scope="module")
def made_up(root):
    """The script that made the golden file."""
    path = root / "script" / "bench" / "make_golden_squad.py"
    spec = importlib.util.spec_from_file_location("make_golden_squad", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden(root):
    return json.loads((root / "tests" / "data" / "squad_golden.json").read_text("utf-8"))


def check_golden(made_up, raws, expected):
    answers, odds = made_up.answer(raws)
    results = {"plain": squad_scores(raws, answers)}
    for name, threshold in made_up.THRESHOLDS.items():
        results[name] = squad_scores(raws, answers, odds, threshold)
    for name, result in results.items():
        reference = expected[name]
        result["exact"] = result.pop("em")
        # From Python 3.12 on `sum` rounds once, before that after each addition.
        assert result == pytest.approx({key: reference[key] for key in result}, rel=1e-13)
    assert results["low"].keys() >= {"best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"}
    return results["low"]


def test_squad_1_equals_transformers(made_up, golden):
    result = check_golden(made_up, made_up.made_up(500, impossible=False), golden["made_up_1"])
    assert "HasAns_exact" not in result


def test_squad_2_equals_transformers(made_up, golden):
    result = check_golden(made_up, made_up.made_up(500, impossible=True), golden["made_up_2"])
    assert result["HasAns_total"] + result["NoAns_total"] == result["total"] == 500


def test_squad_2_equals_transformers_on_real_questions(made_up, golden, real_data):
    name = "cs224n_dev-v2.0.json.gz"
    check_golden(made_up, list(read_mrc(real_data / "squad" / name)), golden[name])


def test_squad_by_hand():
    raws = [raw("a", "The Cat, sat!", "dog"), raw("b", "one two three")]
    scores = squad_scores(raws, {"a": "a cat SAT", "b": "two three four", "other": "x"})
    assert scores == pytest.approx({"em": 50.0, "f1": 100 * (1 + 2 / 3) / 2, "total": 2})


def test_answers_without_words_differ_between_squad_1_and_2():
    # 1.1 compares what is left, and gives no F1 to nothing; 2.0 leaves such an answer out of the right ones.
    assert squad_scores([raw("a", "the")], {"a": "A"}) == {"em": 100.0, "f1": 0.0, "total": 1}
    two = [raw("a", "the", "x"), raw("b", is_impossible=True)]
    scores = squad_scores(two, {"a": "A", "b": ""})
    assert (scores["HasAns_exact"], scores["HasAns_f1"], scores["NoAns_exact"]) == (0.0, 0.0, 100.0)


def test_only_impossible_questions():
    scores = squad_scores([raw("a", is_impossible=True)], {"a": "x"})
    assert scores == {"em": 0.0, "f1": 0.0, "total": 1, "NoAns_exact": 0.0, "NoAns_f1": 0.0, "NoAns_total": 1}


def test_a_question_that_stands_twice_counts_twice():
    raws = [raw("a", "x"), raw("a", "x"), raw("b", "y")]
    assert squad_scores(raws, {"a": "x", "b": ""})["em"] == pytest.approx(200 / 3)
    assert cmrc_scores(raws, {"a": "x", "b": ""})["em"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("scores", [squad_scores, cmrc_scores])
def test_missing_answers_are_wrong_and_counted(scores, caplog):
    raws = [raw("a", "x"), raw("b", "y"), raw("c", is_impossible=True)]
    with caplog.at_level(logging.WARNING, "propeller"):
        assert scores(raws, {"a": "x"})["em"] == pytest.approx(100 / 3)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 questions were not answered and count as wrong"
    ]


@pytest.mark.parametrize("scores", [squad_scores, cmrc_scores])
def test_what_cannot_be_scored(scores):
    with pytest.raises(DataError, match="no question"):
        scores([], {})
    with pytest.raises(DataError, match="'b' has no answer and is not marked"):
        scores([raw("a", "x"), raw("b")], {"a": "x", "b": ""})


def test_bad_arguments():
    with pytest.raises(DataError, match="'a' has no null_odds"):
        squad_scores([raw("a", "x")], {"a": "x"}, {"b": 0.0})
    with pytest.raises(ConfigError, match="no metric 'exact'"):
        find_null_threshold([raw("a", "x")], {"a": "x"}, {"a": 0.0}, metric="exact")


QUESTIONS = st.lists(
    st.tuples(
        st.booleans(),
        st.sampled_from(["x y", "x", "z"]),
        st.sampled_from([-1.5, -0.5, 0.0, 0.25, 2.0, 1e300]),
    ),
    min_size=1,
    max_size=8,
)


@settings(derandomize=True, deadline=None)
@given(QUESTIONS, st.sampled_from(["em", "f1"]))
def test_null_threshold_is_the_best(questions, metric):
    raws, answers, odds = [], {}, {}
    for number, (is_impossible, text, odd) in enumerate(questions):
        name = str(number)
        raws.append(raw(name, *([] if is_impossible else ["x y"]), is_impossible=is_impossible))
        answers[name], odds[name] = text, odd
    threshold, score = find_null_threshold(raws, answers, odds, metric=metric)
    assert score == squad_scores(raws, answers, odds, threshold)[metric]
    tried = [squad_scores(raws, answers, odds, at)[metric] for at in [-2.0, *odds.values()]]
    assert score == pytest.approx(max(tried))


def test_null_threshold_where_it_is_best_to_answer_nothing():
    raws = [raw("a", is_impossible=True), raw("b", "x")]
    assert find_null_threshold(raws, {"a": "y", "b": "y"}, {"a": 1.0, "b": 3.0})[1] == 50.0
    threshold, score = find_null_threshold(raws, {"a": "y", "b": "x"}, {"a": 1.0, "b": 1.0})
    # No threshold lies between equal odds, where the official search finds 100 percent.
    assert threshold < 1.0 and score == 50.0


def test_null_threshold_is_not_a_matter_of_rounding():
    raws = [raw("a", "x"), raw("b", "x"), raw("c", is_impossible=True), raw("d", is_impossible=True)]
    answers = dict.fromkeys("abcd", "x")
    assert find_null_threshold(raws, answers, {"a": -4.0, "b": 1.0, "c": 2.0, "d": 3.0}) == (1.5, 100.0)
    threshold, _ = find_null_threshold(raws[:2], answers, {"a": 1.0, "b": 2.0})
    assert threshold > 2.5, "answers everything"
    threshold, _ = find_null_threshold(raws[2:], answers, {"c": 1.0, "d": 2.0})
    assert threshold < 0.5, "answers nothing"
    high = math.nextafter(2.0, 3.0)
    assert find_null_threshold(raws[1:3], answers, {"b": 2.0, "c": high}) == (2.0, 100.0)


@pytest.mark.parametrize(
    ("right", "given", "em", "f1"),
    [
        (["北京大学"], "北京大学", 1, 1),
        (["《北京》大学。"], "北京-大学", 1, 1),
        (["北京大学"], "北京的大学", 0, 2 * (2 / 5) * (2 / 4) / (2 / 5 + 2 / 4)),  # the longest piece has two
        (["ABC公司"], "abc 公司", 0, 1),  # the blank counts for the letter, not for the words
        (["new york"], "york", 0, 2 / 3),
        (["上海", "北京"], "北京", 1, 1),
        (["上海"], "北京", 0, 0),
        (["上海"], "", 0, 0),
        (["。"], "，", 1, 0),
    ],
)
def test_cmrc_by_hand(right, given, em, f1):
    scores = cmrc_scores([raw("a", *right)], {"a": given})
    expected = {"em": 100 * em, "f1": 100 * f1, "avg": 50 * (em + f1), "question_num": 1}
    assert scores == pytest.approx(expected)


def test_cmrc_of_impossible_questions():
    raws = [raw("a", is_impossible=True), raw("b", is_impossible=True)]
    scores = cmrc_scores(raws, {"a": "", "b": "北"})
    assert scores == {"em": 50.0, "f1": 50.0, "avg": 50.0, "question_num": 2}


def test_cmrc_fills_the_log_line_of_older_scripts():
    raws = [raw(str(number), "京" if number < 3117 else "北京上海") for number in range(3524)]
    scores = cmrc_scores(raws, {question["id"]: "京" for question in raws})
    assert list(scores) == ["em", "f1", "avg", "question_num"]
    line = "em: {em:f}, f1: {f1:f}, avg: {avg:f}, question_num: {question_num}".format(**scores)
    assert line == "em: 88.450624, f1: 93.070375, avg: 90.760499, question_num: 3524"


def near_misses(raws):
    """Answers that are right, cut, too long, elsewhere, empty."""
    rng = random.Random(3)
    answers = {}
    for question in raws:
        context, text = question["context"], rng.choice(question["answers"])["text"]
        place = max(0, context.find(text))
        wide = context[max(0, place - rng.randrange(9)) : place + len(text) + rng.randrange(9)]
        start = rng.randrange(len(context))
        elsewhere = context[start : start + rng.randrange(40)]
        kinds = [text, text[1:], wide, elsewhere, "", text.upper() + "。"]
        answers[question["id"]] = kinds[rng.randrange(6)]
    return answers


# What cmrc2018_evaluate.py says of these answers, with NLTK 3.10.
@pytest.mark.parametrize(
    ("name", "em", "f1"),
    [
        ("cmrc2018/cmrc2018_dev.json.gz", 34.66915191053122, 59.437156714197336),
        ("drcd/DRCD_dev.json.gz", 34.33598183881952, 56.683884184402174),
        ("drcd/DRCD_test.json.gz", 33.83910678499857, 56.33362188799911),
    ],
)
def test_cmrc_equals_the_official_script_on_real_questions(real_data, name, em, f1):
    raws = list(read_mrc(real_data / name))
    scores = cmrc_scores(raws, near_misses(raws))
    assert scores == {"em": em, "f1": f1, "avg": (em + f1) * 0.5, "question_num": len(raws)}
    first = {question["id"]: question["answers"][0]["text"] for question in raws}
    assert cmrc_scores(raws, first)["em"] == 100.0
