"""Ranking and retrieval against trec_eval (golden file) and plain loops, in pieces and merged from shards."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from propeller.errors import ConfigError, DataError
from propeller.metrics import Ranking, Retrieval


@pytest.fixture(scope="module")
def golden(root):
    """Rows of query, candidate, score, label; and the values of trec_eval for each query."""
    content = json.loads((root / "tests" / "data" / "ranking_golden.json").read_text("utf-8"))
    return [tuple(row) for row in content["rows"]], content["values"]


def feed(metric, rows, dtype=np.float32):
    queries, places, scores, labels = map(list, zip(*rows, strict=True))
    features = {"query": queries, "candidate": np.array(places)}
    metric.update({"logits": np.array(scores, dtype)}, np.array(labels), features)
    return metric


def metric_of(rows, **options):
    return feed(Ranking(**options), rows).compute()


CUTS = {"ndcg": (3, 10), "recall": (1, 3)}


def test_each_query_equals_trec_eval(golden):
    rows, values = golden
    assert len({score for *_, score, _ in rows}) < len(rows) / 4, "there are many equal scores"
    for query, expected in values.items():
        found = metric_of([row for row in rows if row[0] == query], **CUTS)
        assert found == pytest.approx({**expected, "queries": 1}, abs=1e-12), query


def test_means_equal_trec_eval(golden):
    rows, values = golden
    found = metric_of(rows, **CUTS)
    expected = {name: np.mean([one[name] for one in values.values()]) for name in next(iter(values.values()))}
    assert found == pytest.approx({**expected, "queries": len(values)}, abs=1e-12)


def test_queries_without_an_answer_can_be_left_out(golden):
    rows, values = golden
    answered = [one for one in values.values() if one["recall@3"] or one["map"]]
    assert 0 < len(answered) < len(values)
    found = metric_of(rows, skip_unanswered=True, **CUTS)
    expected = {name: np.mean([one[name] for one in answered]) for name in answered[0]}
    assert found == pytest.approx({**expected, "queries": len(answered)}, abs=1e-12)


def test_of_equal_scores_the_later_row_goes_first():
    rows = [("q", 0, 0.5, 1), ("q", 1, 0.5, 0), ("q", 2, 0.1, 0)]
    assert metric_of(rows)["mrr"] == 0.5
    assert metric_of([("q", 0, 0.5, 0), ("q", 1, 0.5, 1), ("q", 2, 0.1, 0)])["mrr"] == 1.0
    assert metric_of(rows[::-1])["mrr"] == 0.5, "whatever the order in which they come"


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_pieces_and_shards_give_the_same(golden, num_shards):
    rows, _ = golden
    order = np.random.default_rng(num_shards).permutation(len(rows))
    shards = [Ranking(**CUTS) for _ in range(num_shards)]
    for place, index in enumerate(order.tolist()):
        feed(shards[place % num_shards], [rows[index]])
    merged = Ranking(**CUTS)
    for shard in shards:
        before = shard.compute()
        merged.merge(shard.state())
        assert shard.compute() == pytest.approx(before, nan_ok=True)
    assert merged.compute() == metric_of(rows, **CUTS), "to the last bit"


def test_two_logits_rank_by_their_difference():
    logits = np.array([[0.0, 1.0], [5.0, 5.5], [-3.0, -1.0]])
    metric = Ranking()
    metric.update({"logits": logits}, np.array([1, 0, 0]), {"query": [7, 7, 7], "candidate": np.arange(3)})
    assert metric.compute()["mrr"] == 0.5


def test_labels_may_stand_among_others_and_scores_in_a_column():
    metric = Ranking(label="grade")
    features = {"query": np.array([1, 1]), "candidate": np.array([0, 1])}
    labels = {"grade": np.array([[2], [0]]), "group": np.array([0, 0])}
    metric.update({"logits": np.array([[1.0], [2.0]])}, labels, features)
    assert metric.compute()["ndcg@10"] == pytest.approx(1 / math.log2(3))


def test_nothing_is_not_a_number():
    found = Ranking(recall=(5,)).compute()
    assert found.pop("queries") == 0
    assert found.keys() == {"mrr", "map", "ndcg@10", "p@1", "recall@5"}
    assert all(math.isnan(value) for value in found.values())
    unanswered = metric_of([("q", 0, 1.0, 0)], skip_unanswered=True)
    assert math.isnan(unanswered["mrr"]) and unanswered["queries"] == 0
    assert metric_of([("q", 0, 1.0, 0)])["mrr"] == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("q", 0, math.nan, 1), "NaN"),
        (("q", 0, 1.0, -1), "labels hold -1 in row 0; whole numbers from 0"),
        (("q", 0, 1.0, 0.5), "labels hold 0.5"),
    ],
)
def test_bad_values_change_nothing(row, message):
    metric = feed(Ranking(), [("q", 0, 1.0, 1)])
    with pytest.raises(DataError, match=message):
        feed(metric, [row])
    assert metric.compute()["queries"] == 1 and metric.compute()["mrr"] == 1.0


def test_a_missing_column_is_named():
    with pytest.raises(ConfigError, match="column 'query' of the data, which has \\['candidate'\\]"):
        Ranking().update({"logits": np.zeros(1)}, np.zeros(1), {"candidate": np.zeros(1)})
    with pytest.raises(DataError, match="2 queries and 1 candidates for 1 rows"):
        Ranking().update({"logits": np.zeros(1)}, np.zeros(1), {"query": [1, 2], "candidate": np.zeros(1)})


@pytest.mark.parametrize("options", [{"ndcg": (0,)}, {"recall": (2.5,)}, {"ndcg": ("10",)}])
def test_cuts_are_checked(options):
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        Ranking(**options)


# Retrieval


def make_texts(seed, *, queries=70, passages=150, size=6):
    """Rows of (query, text, label, vector): more queries than are ranked at a time, and double texts."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(queries + passages, size)).astype(np.float32)
    rows = []
    for query in range(queries):
        rows.append((query, query, Retrieval.QUERY, vectors[query]))
        for label in rng.integers(2, size=rng.integers(1, 6)).tolist():
            text = queries + int(rng.integers(passages))
            rows.append((query, text, label, vectors[text]))
    rows += rows[: len(rows) // 4]  # texts that stand in the data twice
    return rows


def feed_texts(metric, rows):
    query, text, label, vectors = zip(*rows, strict=True)
    features = {"query": np.array(query), "text": np.array(text), "label": np.array(label)}
    metric.update({"embeddings": np.stack(vectors)}, None, features)
    return metric


def plain_mrr_and_recall(rows, given, k=10):
    vector = {text: row[3] for row in rows if row[2] != Retrieval.QUERY for text in [row[1]]}
    asked = {row[0]: row[3] for row in rows if row[2] == Retrieval.QUERY}
    reciprocals, recalls = [], []
    for query, own in asked.items():
        right = {row[1] for row in rows if row[0] == query and row[2] == 1}
        if not right:
            continue
        among = {row[1] for row in rows if row[0] == query and row[2] != Retrieval.QUERY} if given else vector
        order = sorted(among, key=lambda text: (float(own @ vector[text]), text), reverse=True)
        reciprocals.append(1 / (1 + min(order.index(text) for text in right)))
        recalls.append(len(right & set(order[:k])) / len(right))
    return np.mean(reciprocals), np.mean(recalls), len(reciprocals)


@pytest.mark.parametrize("given", [False, True])
def test_retrieval_equals_a_plain_loop(given):
    rows = make_texts(3)
    found = feed_texts(Retrieval(given=given), rows).compute()
    mrr, recall, number = plain_mrr_and_recall(rows, given)
    assert found["queries"] == number < 70, "queries without a right passage do not count"
    assert (found["mrr"], found["recall@10"]) == (pytest.approx(mrr), pytest.approx(recall))


def test_retrieval_merges_from_shards():
    rows = make_texts(4)
    whole = feed_texts(Retrieval(), rows).compute()
    merged = Retrieval()
    for shard in range(3):
        merged.merge(feed_texts(Retrieval(), rows[shard::3]).state())
    merged.merge(Retrieval().state())
    assert merged.compute() == pytest.approx(whole, abs=1e-12)


def test_an_evaluation_that_ends_early_ranks_what_was_seen():
    rows = make_texts(5)
    without = [row for row in rows if not (row[0] == 0 and row[2] == Retrieval.QUERY)]
    found = feed_texts(Retrieval(), without).compute()
    assert 0 < found["queries"] <= 69


def test_retrieval_over_nothing():
    found = Retrieval().compute()
    assert found.pop("queries") == 0 and all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("vectors", [np.zeros(2), np.full((2, 3), np.nan)])
def test_retrieval_wants_a_vector_a_row(vectors):
    features = dict.fromkeys(("query", "text", "label"), np.zeros(2, np.int64))
    with pytest.raises(DataError, match="one embedding of finite numbers"):
        Retrieval().update({"embeddings": vectors}, None, features)
