"""Entity scores against seqeval and conlleval.pl; `script/bench/make_golden_entities.py` has asked them."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path

import pytest

from ernie.tasks.entity_scores import entity_scores
from ernie.tasks.ner_files import find_tags, read_ner
from propeller.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).resolve().parents[2] / "data" / "entity_scores.json").read_text("utf-8"))
CASES = GOLDEN["cases"]
NAMES = ("precision", "recall", "f1")


def unpacked(case, side):
    letters = dict(zip(string.ascii_letters, case["alphabet"], strict=False))
    return [[letters[letter] for letter in line] for line in case[side].split(" ")]


def check_seqeval(scores, expected):
    """To the last bit but one: numpy takes means in another order."""
    near = {"rel": 1e-15, "abs": 0}
    assert [scores[name] for name in NAMES] == expected["all"]
    assert [scores[f"macro_{name}"] for name in NAMES] == pytest.approx(expected["macro"], **near)
    rows = [[row[name] for name in (*NAMES, "support")] for row in scores["types"].values()]
    assert rows == [pytest.approx(row, **near) for row in expected["types"]]
    assert scores["support"] == sum(row[-1] for row in expected["types"])


def check_conlleval(scores, expected):
    """To the second digit of the percentage, which is all that it prints."""
    *overall, phrases = expected["all"]
    assert scores["support"] == phrases
    assert [100 * scores[name] for name in NAMES] == pytest.approx(overall, abs=0.00501)
    types = {kind: [100 * row[name] for name in NAMES] for kind, row in scores["types"].items()}
    assert types == {kind: pytest.approx(row, abs=0.00501) for kind, row in expected["types"].items()}


@pytest.mark.parametrize("scheme", ["BIO", "IOB1", "BIOES", "BMES"])
@pytest.mark.parametrize("mode", ["default", "strict", "conlleval"])
def test_equals_the_tool_on_random_tags(scheme, mode):
    cases = [case for case in CASES if case["scheme"] == scheme and mode in case]
    assert len(cases) == (0 if mode == "conlleval" and "E" in scheme else 20)
    check = check_conlleval if mode == "conlleval" else check_seqeval
    for case in cases:
        gold, predicted = unpacked(case, "gold"), unpacked(case, "predicted")
        check(entity_scores(gold, predicted, scheme=scheme, mode=mode), case[mode])


@pytest.mark.parametrize("name", GOLDEN["real"])
def test_equals_the_tools_on_real_data(real_data, name):
    gold = [raw["labels"] for raw in read_ner(real_data / name)]
    labels = sorted(find_tags(real_data / name).labels)
    numbers = itertools.count()
    predicted = [
        [labels[i * i % len(labels)] if (i := next(numbers)) % 7 == 3 else tag for tag in line]
        for line in gold
    ]
    expected = GOLDEN["real"][name]
    for mode in ("default", "strict"):
        check_seqeval(entity_scores(gold, predicted, scheme="BIO", mode=mode), expected[mode])
    check_conlleval(entity_scores(gold, predicted, mode="conlleval"), expected["conlleval"])


def test_a_case_by_hand():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC"]]
    scores = entity_scores(gold, predicted)
    assert scores == {
        "precision": 1 / 3,
        "recall": 1 / 3,
        "f1": 1 / 3,
        "support": 3,
        "macro_precision": 0.25,
        "macro_recall": 0.5,
        "macro_f1": pytest.approx(1 / 3),
        "types": {
            "LOC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2},
            "PER": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
        },
    }


def test_modes_differ_where_tags_are_not_well_formed():
    gold, predicted = [["B-A", "I-A", "O"]], [["I-A", "I-A", "O"]]
    assert entity_scores(gold, predicted)["f1"] == 1
    assert entity_scores(gold, predicted, mode="conlleval")["f1"] == 1
    assert entity_scores(gold, predicted, mode="strict", scheme="BIO")["f1"] == 0
    assert entity_scores(gold, predicted, mode="strict", scheme="IOB1")["recall"] == 0


@pytest.mark.parametrize(
    ("gold", "predicted", "chunks"),
    [
        # conlleval's own example of E: it begins a chunk after E, not after I, and ends one before E or I
        (["I-A", "E-A", "E-A"], ["I-A", "E-A", "I-A"], (2, 2)),
        (["E-A", "O"], ["B-A", "O"], (1, 1)),
        # S is no letter of conlleval's: chunks of one type run together
        (["S-A", "S-A"], ["B-A", "I-A"], (1, 1)),
    ],
)
def test_chunks_of_conlleval(gold, predicted, chunks):
    scores = entity_scores([gold], [predicted], mode="conlleval")
    assert (scores["support"], round(scores["recall"] * scores["support"])) == chunks


@pytest.mark.parametrize("mode", ["default", "strict", "conlleval"])
@pytest.mark.parametrize("tags", [[], [[]], [["O", "O"]]])
def test_without_entities(mode, tags):
    scores = entity_scores(tags, tags, scheme="BIO", mode=mode)
    assert scores["types"] == {}
    assert {scores[key] for key in scores if key != "types"} == {0}


@pytest.mark.parametrize("mode", ["default", "strict", "conlleval"])
def test_tags_that_are_none_do_not_raise(mode):
    gold = [["B-PER", "I-PER", "O", "O", "O", "O"]]
    predicted = [["B-PER", "I-PER", "", "-", "[CLS]", "\ud800"]]
    scores = entity_scores(gold, predicted, scheme="BIO", mode=mode)
    assert scores["recall"] == 1


class TestErrors:
    def test_mode(self):
        with pytest.raises(
            ConfigError, match=r"mode is 'stric'; expected default, .* Did you mean 'strict'\?"
        ):
            entity_scores([], [], mode="stric")

    def test_strict_without_scheme(self):
        with pytest.raises(ConfigError, match="Strict scores need the scheme"):
            entity_scores([], [], mode="strict")

    def test_scheme(self):
        with pytest.raises(ConfigError, match="'BILOU' is no tagging scheme"):
            entity_scores([], [], mode="strict", scheme="BILOU")

    @pytest.mark.parametrize("gold", [[["O"]], [["O"], ["O"], ["O"]]])
    def test_numbers_of_examples(self, gold):
        with pytest.raises(DataError, match=r"Only [12] examples have (gold|predicted) tags, more have"):
            entity_scores(gold, [["O"], ["O"]])

    def test_numbers_of_tags(self):
        with pytest.raises(DataError, match="Example 2 has 1 gold tags and 2 predicted ones"):
            entity_scores([["O"], ["O"]], [["O"], ["O", "O"]])
