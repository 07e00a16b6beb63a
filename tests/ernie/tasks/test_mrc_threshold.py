"""A bundle for questions gets the best threshold for no answer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ernie.tasks.mrc import MrcProcessor
from ernie.tasks.mrc_threshold import tune_null_threshold
from ernie.tokenizing import SpecialTokens, WordPieceTokenizer
from propeller.bundle import ArraySpec, read_bundle, write_bundle, write_probe
from propeller.errors import DataError


def make(score="squad", **search):
    """A processor whose questions may have no answer."""
    tokenizer = WordPieceTokenizer({name: place for place, name in enumerate(SpecialTokens().names())})
    return MrcProcessor(
        tokenizer, max_seqlen=9, max_query_length=4, search={"with_negative": True, **search}, score=score
    )


@pytest.fixture
def published(tmp_path):
    """The link to a bundle, as an exporter leaves it."""
    folder = tmp_path / "best" / ".inference" / "step_00000010"
    folder.mkdir(parents=True)
    for name in ("model.json", "model.pdiparams"):
        (folder / name).write_bytes(b"opaque here")
    write_probe(folder, {"input_ids": np.zeros((1, 1), np.int64)}, {})
    (folder / "best.json").write_text('{"step": 10}')
    write_bundle(
        folder,
        inputs=[ArraySpec("input_ids", "int64", ("batch", "seq_len"))],
        outputs=(),
        processor=make(n_best_size=3),
        metrics={"dev": {"loss": 0.3, "f1": 25.0, "em": 25.0}, "other": {"loss": 0.5}},
        metadata={"ignores_padding": True, "versions": {"paddle": "x"}},
    )
    link = tmp_path / "best" / "inference"
    link.symlink_to(folder)
    return link


def answered(*rows):
    """Questions and the answers to them; of each what is right (None: nobody knows), what was found, odds."""
    raws, answers = [], []
    for number, (right, text, null_odds) in enumerate(rows):
        found = [{"text": right, "answer_start": -1}] if right else []
        raws.append({"id": str(number), "answers": found, "is_impossible": right == ""})
        answers.append({"text": "", "null_odds": null_odds, "nbest": [{"text": ""}, {"text": text}]})
    return raws, answers


DEV = answered(("a", "a", 1.0), ("", "b", 5.0), ("c", "c", 2.0), (None, "d", 3.0), ("e", "x", 6.0))
TEST = answered(("a", "a", 1.0), ("", "b", 3.0), ("c", "c", 4.0))


def test_a_threshold_is_sought_until_there_is_one():
    seeking = make(n_best_size=3)
    assert seeking.seeks_null_threshold and seeking.best_metric == "best_f1"
    found = seeking.with_null_threshold(-1.5)
    search = {**seeking.settings["search"], "null_score_diff_threshold": -1.5}
    assert found.settings == {**seeking.settings, "search": search}
    given = make(null_score_diff_threshold=0.0)
    for processor in (found, given, make(with_negative=False), make(score="cmrc")):
        assert not processor.seeks_null_threshold and processor.best_metric != "best_f1"


def test_the_bundle_and_its_metrics_are_those_with_the_threshold(published):
    before = read_bundle(published)
    assert before.processor().seeks_null_threshold
    processor = tune_null_threshold(published, {"dev": DEV, "test": TEST})
    after = read_bundle(published)
    assert after.processor().settings == processor.settings
    # Halfway between the questions that somebody knows the answers to.
    assert processor.search.null_score_diff_threshold == 3.5
    dev, other, test = (after.metrics[name] for name in ("dev", "other", "test"))
    assert dev["f1"] == dev["best_f1"] == 75 and dev["loss"] == 0.3
    assert (test["HasAns_f1"], test["NoAns_f1"], test["best_f1"]) == (50, 0, pytest.approx(200 / 3))
    assert other == {"loss": 0.5}
    assert after.folder != before.folder and before.folder.exists() and published.is_symlink()
    assert json.loads((published / "best.json").read_text()) == {"step": 10}


def test_again_it_may_find_another(published):
    tune_null_threshold(published, {"dev": DEV})
    tune_null_threshold(published, {"dev": TEST})
    assert read_bundle(published).processor().search.null_score_diff_threshold == 2.0


def test_nothing_to_tune_on(published):
    with pytest.raises(DataError, match="no question to score"):
        tune_null_threshold(published, {"dev": answered((None, "a", 1.0))})
    assert read_bundle(published).processor().seeks_null_threshold
