"""The ranking processor: texts to arrays, logits to answers, metrics, settings."""

from __future__ import annotations

import numpy as np
import pytest

from ernie.tasks.groups import Groups
from ernie.tasks.ranking import RankingLoss, RankingProcessor, ranking_report
from ernie.tokenizing import load_tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError
from propeller.metrics import compute_all
from propeller.processor import find_processor
from propeller.types import HParams


@pytest.fixture(scope="module")
def tokenizer(bert_folder):
    return load_tokenizer(bert_folder)


@pytest.fixture
def make(tokenizer):
    def build(loss="pointwise", **options):
        return RankingProcessor(tokenizer, **{"max_seqlen": 16, "loss": loss, **options})

    return build


def test_examples(make, tokenizer):
    raws = [
        {"text_a": "the cat", "text_b": "a mat", "label": 2, "qid": "7", "candidate": 3},
        {"text_a": "a dog", "text_b": ""},
    ]
    labelled, plain = make().prepare(raws)
    assert tokenizer.convert_ids_to_tokens(labelled["input_ids"]) == [
        "[CLS]", "the", "cat", "[SEP]", "a", "mat", "[SEP]",
    ]  # fmt: skip
    assert labelled["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (labelled["label"], labelled["query"], labelled["candidate"]) == (2, "7", 3)
    assert plain.keys() == {"input_ids", "token_type_ids", "num_tokens"}
    long = make(max_seqlen=6).prepare([{"text_a": "the cat", "text_b": "a mat sat on a cat"}])[0]
    assert len(long["input_ids"]) == 6 and long["num_tokens"] == 11


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"text_a": "a"}, "text_b is missing"),
        ({"text_a": 3, "text_b": "b"}, "text_a is 3; expected a string"),
    ],
)
def test_a_text_that_is_none(make, raw, message):
    with pytest.raises(DataError, match=message):
        make().prepare([raw])


def test_answers(make):
    answers = make().finish({"logits": np.array([[0.0, 0.0], [1.0, 3.0], [1e4, -1e4]], np.float32)})
    assert [answer["label"] for answer in answers] == [0, 1, 0]
    expected = [0.5, 1 / (1 + np.exp(-2)), 0]
    assert [answer["score"] for answer in answers] == pytest.approx(expected)
    assert make("listwise").finish({"logits": np.array([[2.5], [-1]])}) == [{"score": 2.5}, {"score": -1.0}]
    assert make().format({}, answers[1]) == "0.88079708"


def test_lines(make):
    assert make().parse("who\the") == {"text_a": "who", "text_b": "he"}
    for line in ("who", "who\the\t1"):
        with pytest.raises(DataError, match="expected text_a<TAB>text_b, found"):
            make().parse(line)


def test_metrics(make):
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]], np.float32)
    labels = np.array([3, 0, 0])  # a grade above 1 is relevant, too
    features = {"query": ["1"] * 3, "candidate": np.arange(3)}
    processor = make()
    metrics = processor.metrics()
    for metric in metrics.values():
        metric.update({"logits": logits}, labels, features)
    values = compute_all(metrics)
    assert values["mrr"] == 0.5 and values["acc"] == pytest.approx(2 / 3)
    assert values["f1"] == pytest.approx(2 / 3) and values["queries"] == 1
    assert processor.best_metric in values
    assert list(make("pairwise").metrics()) == ["ranking"]
    assert make(skip_unanswered=True).metrics()["ranking"].skip_unanswered


def test_a_saved_processor_is_the_same(make, tmp_path):
    processor = make("listwise", skip_unanswered=True)
    settings = processor.save(tmp_path)
    again = find_processor("ranking").load(tmp_path, settings)
    assert again.settings == processor.settings and again.fingerprint == processor.fingerprint
    assert make().fingerprint != processor.fingerprint


def test_bad_settings(make):
    with pytest.raises(ConfigError, match="loss is 'pairwize'. Did you mean 'pairwise'"):
        make("pairwize")
    with pytest.raises(ConfigError, match="max_seqlen 4 leaves no room for two texts"):
        make(max_seqlen=4)
    with pytest.raises(ConfigError, match="skip_unanswered must be true or false"):
        make(skip_unanswered="no")
    with pytest.raises(ConfigError, match="pair_loss is 'hing'. Did you mean 'hinge'"):
        RankingLoss.of(HParams({"pair_loss": "hing"}))
    for margin in (0, -1.0, "1", True, float("nan")):
        with pytest.raises(ConfigError, match="margin must be a number"):
            RankingLoss.of(HParams({"margin": margin}))


def groups(name, *labels):
    rows = [
        {"input_ids": np.zeros(3), "label": label, "candidate": place}
        for group in labels
        for place, label in enumerate(group)
    ]
    return {name: Groups(name, Dataset.from_list(rows))}


@pytest.mark.parametrize(("name", "purpose"), [("train", "learn from"), ("dev", "choose the best model by")])
def test_without_any_relevant_candidate(name, purpose):
    with pytest.raises(DataError, match=f"The {name} set has no relevant candidate.* nothing to {purpose}"):
        ranking_report(groups(name, [0, 0], [0]))
    assert "relevant: 0.0%" in ranking_report(groups("test", [0, 0], [0]))


def test_report():
    assert ranking_report(groups("dev", [1, 0, 0], [0])) == (
        "dev: 2 queries, 4 rows, candidates a query: mean 2.0, most 3; relevant: 25.0%; queries without a "
        "relevant candidate: 1"
    )
