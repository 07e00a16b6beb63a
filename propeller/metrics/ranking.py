"""Metrics over the order that a model gives to the candidates of each query.

Of the candidates of a query those with a label above 0 are relevant, and the label is how much so. They are
ordered by falling score; of equal scores the one that stands later in the data goes first. That is the order
of trec_eval, which breaks ties by falling document id, where the ids rise with the rows.

Shapes: B rows of a batch, N rows in all, Q queries, D dimensions of an embedding.

Source: trec_eval 9: `recip_rank`, `map`, `P_1`, `recall_k` (binary), `ndcg_cut_k` (the label is the gain, the
    discount is `log2(rank + 1)`, and the ideal order is that of all candidates, cut at k).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from propeller.errors import ConfigError, DataError
from propeller.metrics.base import (
    Array,
    Metric,
    as_column,
    check_rows,
    read_numbers,
    read_output,
    read_values,
    state_array,
)

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# Queries whose scores of all passages are held at a time.
_CHUNK = 64


class Cutoffs(NamedTuple):
    """At which ranks values are cut.

    Attributes:
        ndcg: gives `ndcg@k` for each k.
        recall: gives `recall@k` for each k.
    """

    ndcg: tuple[int, ...]
    recall: tuple[int, ...]

    @classmethod
    def of(cls, ndcg: Sequence[int], recall: Sequence[int]) -> Cutoffs:
        """Checks them.

        Raises:
            ConfigError: one is no whole number of at least 1.
        """
        for rank in (*ndcg, *recall):
            if type(rank) is not int or rank < 1:
                raise ConfigError(f"a ranking is cut at {rank!r}; expected a whole number of at least 1.")
        return cls(tuple(ndcg), tuple(recall))


class Ranking(Metric):
    """How well the candidates of each query are ordered: means over the queries.

    Reads `predictions[key]`, a score `[B]` or `[B, 1]`, or two logits `[B, 2]`, ranked by the second less the
    first, which is the order that a softmax gives; labels `[B]` or `[B, 1]`, whole numbers from 0; of the
    features `query`, texts or whole numbers that name each row's query, and `candidate`, whole numbers that
    rise in the order in which the rows of a query stand in the data. The rows of a query may come in any
    batch and on any rank.

    Gives `mrr`, `map`, `ndcg@k`, `p@1`, `recall@k`, and `queries`, the number of those that count.

    Args:
        ndcg, recall: see `Cutoffs`.
        skip_unanswered: whether queries without a relevant candidate are left out, as is the custom for
            WikiQA; otherwise they count as 0, as trec_eval counts them.
        key: which output holds the scores.
        label: which of the labels it is, where a model has several.

    Raises:
        ConfigError: a cutoff that is no whole number of at least 1.
    """

    def __init__(
        self,
        *,
        ndcg: Sequence[int] = (10,),
        recall: Sequence[int] = (),
        skip_unanswered: bool = False,
        key: str = "logits",
        label: str = "label",
    ):
        self.cutoffs = Cutoffs.of(ndcg, recall)
        self.skip_unanswered = skip_unanswered
        self.key = key
        self.label = label
        self.reset()

    def reset(self) -> None:
        self._numbers: dict[str | int, int] = {}
        self._chunks: list[Floats] = []  # query number, candidate, score, label: [4, rows]

    def update(self, predictions: Mapping[str, Array], labels: Any, features: Mapping[str, Any]) -> None:
        scores = _read_scores(predictions, self.key)
        grades = _read_grades(labels[self.label] if isinstance(labels, Mapping) else labels)
        check_rows(scores, grades, self.key)
        queries, places = _column(features, "query"), _column(features, "candidate")
        queries = queries.tolist() if isinstance(queries, np.ndarray) else list(queries)
        if not len(queries) == len(places) == len(grades):
            raise DataError(
                f"{len(queries)} queries and {len(places)} candidates for {len(grades)} rows; expected one "
                "each for every row."
            )
        self._add(queries, [read_values(read_numbers(places, "candidate"), "candidate"), scores, grades])

    def _add(self, queries: Sequence[str | int], columns: Sequence[Floats]) -> None:
        numbers = [self._numbers.setdefault(query, len(self._numbers)) for query in queries]
        self._chunks.append(np.stack([np.array(numbers, dtype=np.float64), *columns]))

    def compute(self) -> Mapping[str, float]:
        query, place, score, label = self._rows()
        values = _measures(query, place, score, label, cutoffs=self.cutoffs)
        return _means(values, self.skip_unanswered)

    def state(self) -> dict[str, Array]:
        text = json.dumps(list(self._numbers)).encode()
        return {"queries": np.frombuffer(text, dtype=np.uint8), "rows": self._rows().copy()}

    def merge(self, state: Mapping[str, Array]) -> None:
        names = json.loads(state_array(state, "queries").tobytes())
        numbers, *columns = state_array(state, "rows").astype(np.float64)
        self._add([names[int(number)] for number in numbers], columns)

    def _rows(self) -> Floats:
        self._chunks = [np.concatenate([np.zeros((4, 0)), *self._chunks], axis=1)]
        return self._chunks[0]


class Retrieval(Metric):
    """How well queries find their passages by the product of embeddings: means over the queries.

    Reads `predictions[key]`, `[B, D]`, and of the features, int64 `[B]` each: `query`, which stands for the
    text of the row's query; `text`, which stands for the row's own text; and `label`: 1 for a passage that
    is right for its query, 0 for one that is not, 2 (`QUERY`) for the query itself. Equal texts are one
    passage, equal queries one query, right for which is what is right for either.

    Gives what `Ranking` gives; of equal scores the passage whose `text` is higher goes first. A query without
    a right passage does not count, but its passages are there to be found by others.

    Args:
        ndcg, recall: see `Cutoffs`.
        given: whether a query ranks the passages it came with alone, rather than all.
        key: which output holds the embeddings.
    """

    QUERY = 2

    def __init__(
        self,
        *,
        ndcg: Sequence[int] = (10,),
        recall: Sequence[int] = (1, 10),
        given: bool = False,
        key: str = "embeddings",
    ):
        self.cutoffs = Cutoffs.of(ndcg, recall)
        self.given = given
        self.key = key
        self.reset()

    def reset(self) -> None:
        self._ids: list[Ids] = []  # query, text, label: [3, rows]
        self._vectors: list[npt.NDArray[np.float32]] = []

    def update(self, predictions: Mapping[str, Array], labels: Any, features: Mapping[str, Any]) -> None:
        vectors = read_output(predictions, self.key)
        if vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise DataError(
                f"predictions[{self.key!r}] has shape {list(vectors.shape)}; one embedding of finite numbers "
                "for each row was expected."
            )
        names = ("query", "text", "label")
        ids = np.stack([as_column(read_numbers(_column(features, name), name), name) for name in names])
        check_rows(vectors, ids[0], self.key)
        self._ids.append(ids.astype(np.int64))
        self._vectors.append(vectors.astype(np.float32))

    def compute(self) -> Mapping[str, float]:
        if not self._ids:
            return _means(_measures(*np.zeros((4, 0)), cutoffs=self.cutoffs), skip_unanswered=True)
        (query, text, label), vectors = np.concatenate(self._ids, axis=1), np.concatenate(self._vectors)
        is_query = label == self.QUERY
        queries, query_rows = np.unique(query[is_query], return_index=True)
        texts, text_rows = np.unique(text[~is_query], return_index=True)
        found = np.isin(query[~is_query], queries)  # not all, where an evaluation ends early
        asked = np.searchsorted(queries, query[~is_query][found])
        passage = np.searchsorted(texts, text[~is_query][found])
        is_right = label[~is_query][found] == 1
        query_vectors, text_vectors = vectors[is_query][query_rows], vectors[~is_query][text_rows]
        answered = np.unique(asked[is_right])
        parts = [_measures(*np.zeros((4, 0)), cutoffs=self.cutoffs)]
        for start in range(0, len(answered), _CHUNK):
            chosen = answered[start : start + _CHUNK]
            ours = np.isin(asked, chosen)
            place = np.searchsorted(chosen, asked[ours]), passage[ours]
            grades = np.zeros((len(chosen), len(texts)))
            np.maximum.at(grades, place, is_right[ours])
            ranked = np.full(grades.shape, not self.given)
            ranked[place] = True
            row, column = np.nonzero(ranked)
            scores = query_vectors[chosen] @ text_vectors.T
            flat = (row, column, scores[ranked], grades[ranked])
            parts.append(_measures(*(values.astype(np.float64) for values in flat), cutoffs=self.cutoffs))
        merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return _means(merged, skip_unanswered=True)

    def state(self) -> dict[str, Array]:
        ids = np.concatenate([np.zeros((3, 0), np.int64), *self._ids], axis=1)
        vectors = np.concatenate(self._vectors) if self._vectors else np.zeros((0, 1), np.float32)
        return {"ids": ids, "vectors": vectors}

    def merge(self, state: Mapping[str, Array]) -> None:
        ids, vectors = state_array(state, "ids"), state_array(state, "vectors")
        if ids.shape[1]:
            self._ids.append(ids)
            self._vectors.append(vectors)


def _measures(
    query: Floats, place: Floats, score: Floats, label: Floats, *, cutoffs: Cutoffs
) -> dict[str, Floats]:
    """The measures of each query, and `relevant`, how many relevant candidates it has: float64 `[Q]` each.

    Args:
        query, place, score, label: of each row, `[N]`; a query is a number.
        cutoffs: where to cut.
    """
    order = np.lexsort((-place, -score, query))
    query, label = query[order], label[order]
    ideal = label[np.lexsort((-label, query))]
    starts = np.flatnonzero(np.diff(query, prepend=np.nan) != 0)
    rank = np.arange(len(query)) - np.repeat(starts, np.diff([*starts, len(query)])) + 1
    is_relevant = label > 0
    # Relevant candidates of the row's query up to the row.
    seen = np.cumsum(is_relevant)
    seen = seen - np.repeat((seen - is_relevant)[starts], np.diff([*starts, len(query)]))

    def total(values: Array) -> Floats:
        # `reduceat` takes no empty input.
        return np.add.reduceat(values.astype(np.float64), starts) if len(starts) else np.zeros(0)

    def dcg(gains: Floats, cut: int) -> Floats:
        return total(np.where(rank <= cut, gains / np.log2(rank + 1), 0.0))

    relevant = total(is_relevant)
    divisor = np.maximum(relevant, 1)
    measures = {
        "mrr": total(np.where(is_relevant & (seen == 1), 1 / rank, 0.0)),
        "map": total(np.where(is_relevant, seen / rank, 0.0)) / divisor,
    }
    for cut in cutoffs.ndcg:
        best = dcg(ideal, cut)
        measures[f"ndcg@{cut}"] = dcg(label, cut) / np.where(best > 0, best, 1.0)
    measures["p@1"] = total(is_relevant & (rank == 1))
    for cut in cutoffs.recall:
        measures[f"recall@{cut}"] = total(is_relevant & (rank <= cut)) / divisor
    return {**measures, "relevant": relevant}


def _means(measures: Mapping[str, Floats], skip_unanswered: bool) -> dict[str, float]:
    """The means over the queries, `nan` where there is none, and the number of queries."""
    counts = measures["relevant"] > 0 if skip_unanswered else np.ones(len(measures["relevant"]), dtype=bool)
    number = int(counts.sum())
    means: dict[str, float] = {}
    for name, values in measures.items():
        if name != "relevant":
            # Rounded once, so that it does not matter in which order ranks bring in their queries.
            means[name] = math.fsum(values[counts].tolist()) / number if number else math.nan
    return {**means, "queries": number}


def _read_scores(predictions: Mapping[str, Array], key: str) -> Floats:
    output = read_output(predictions, key)
    if output.ndim == 2 and output.shape[1] == 2:
        with np.errstate(invalid="ignore"):  # inf - inf is the NaN that is refused below
            output = output[:, 1].astype(np.float64) - output[:, 0]
    return read_values(output, f"predictions[{key!r}]", expected="[B], [B, 1] or [B, 2]")


def _read_grades(labels: Any) -> Floats:
    grades = read_values(read_numbers(labels, "labels"), "labels")
    wrong = np.flatnonzero((grades < 0) | (grades != np.floor(grades)))
    if wrong.size:
        raise DataError(
            f"labels hold {grades[wrong[0]]:g} in row {wrong[0]}; whole numbers from 0 were expected, where "
            "0 is not relevant."
        )
    return grades


def _column(features: Mapping[str, Any], name: str) -> Any:
    """A column of the batch, as a list or an array.

    Raises:
        ConfigError: there is no such column.
    """
    if name not in features:
        raise ConfigError(
            f"a ranking is measured by the column {name!r} of the data, which has {sorted(features)}."
        )
    return features[name]
