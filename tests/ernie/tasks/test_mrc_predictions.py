"""The files of predictions: their shapes, and what cannot be written or answered."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from ernie.tasks.mrc import MrcProcessor
from ernie.tasks.mrc_predictions import answer_questions, write_predictions
from ernie.tokenizing import SpecialTokens, WordPieceTokenizer
from propeller.errors import DataError

ENTRY = {"text": "猫", "start": 0, "end": 1, "probability": 1.0, "start_logit": 1.5, "end_logit": -2.0}
ANSWER = {"text": "猫", "start": 0, "end": 1, "score": 1.0, "null_odds": -3.25, "nbest": [ENTRY]}


def contents(folder):
    return {path.name: json.loads(path.read_text("utf-8")) for path in folder.iterdir()}


def test_the_three_files(tmp_path):
    empty = {**ANSWER, "text": "", "nbest": [{**ENTRY, "text": ""}, ENTRY]}
    write_predictions(tmp_path / "new", [{"id": "b"}, {"id": "a"}], [ANSWER, empty])
    entry = {"text": "猫", "probability": 1.0, "start_logit": 1.5, "end_logit": -2.0}
    assert contents(tmp_path / "new") == {
        "predictions.json": {"b": "猫", "a": ""},
        "nbest_predictions.json": {"b": [entry], "a": [{**entry, "text": ""}, entry]},
        "null_odds.json": {"b": -3.25, "a": -3.25},
    }
    text = (tmp_path / "new" / "predictions.json").read_text("utf-8")
    assert text == '{\n    "b": "猫",\n    "a": ""\n}\n'


def test_half_a_character_can_be_written(tmp_path):
    half = {**ANSWER, "text": "a\ud83d", "nbest": [{**ENTRY, "text": "a\ud83d"}]}
    write_predictions(tmp_path, [{"id": "\udc00"}], [half])
    assert contents(tmp_path)["predictions.json"] == {"\udc00": "a\ud83d"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out/predictions\.json: cannot be written"):
        write_predictions(tmp_path / "file" / "out", [{"id": "1"}], [ANSWER])


def test_a_question_that_cannot_be_answered_is_named():
    tokenizer = WordPieceTokenizer({name: place for place, name in enumerate(SpecialTokens().names())})
    processor = MrcProcessor(tokenizer, max_seqlen=8, max_query_length=4)
    predictor = SimpleNamespace(bundle=SimpleNamespace(inputs=[SimpleNamespace(name="input_ids")]))
    with pytest.raises(DataError, match="id 'q7' cannot be answered: The context is missing"):
        answer_questions(predictor, processor, [{"id": "q7", "question": "?"}])
