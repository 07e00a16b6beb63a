"""Ranking: how well a text (a title, an answer, a passage) fits a query, without Paddle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie.tasks.groups import PADDING, Groups
from ernie.tasks.processor import TextProcessor
from ernie.tasks.ranking_files import read_ranking
from ernie.tokenizing import Tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError, did_you_mean
from propeller.metrics import F1, Acc, Metric, Ranking
from propeller.metrics.base import Array
from propeller.processor import Answer, Raw, register_processor
from propeller.types import HParamsGroup, as_switch

LOSSES = ("pointwise", "pairwise", "listwise")
PAIR_LOSSES = ("hinge", "logistic")

# The special tokens, and one of each text.
_MIN_SEQLEN = 5


@dataclasses.dataclass(frozen=True)
class RankingLoss(HParamsGroup):
    """What a ranker learns from, as hyper-parameters name it.

    Attributes:
        loss: `pointwise`: each row alone, relevant (a label above 0) or not, by cross entropy; `pairwise`:
            each two candidates of a query with different labels; `listwise`: all candidates of a query.
        pair_loss: of `pairwise`: `hinge` with `margin`, or `logistic` (RankNet).
        margin: by how much the better one of a pair is to be ahead.

    Raises:
        ConfigError: a value that cannot be used.
    """

    loss: str = "pointwise"
    pair_loss: str = "hinge"
    margin: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("loss", LOSSES), ("pair_loss", PAIR_LOSSES)):
            value = getattr(self, name)
            if value not in known:
                near = did_you_mean(value, known)
                raise ConfigError(f"{name} is {value!r}.{near} There are: {', '.join(known)}.")
        self.check_above_0("margin")


@register_processor
class RankingProcessor(TextProcessor):
    """Queries with a candidate each in, scores out: the higher, the better it fits.

    Trained point-wise the score is the probability that the candidate is relevant, and there is a label.
    Otherwise scores say which of two candidates of one query fits better, and nothing beyond that.

    Args:
        tokenizer: the model's tokenizer.
        max_seqlen: tokens of an example at most, special ones included; the longer text is cut first.
        loss: one of `LOSSES`.
        skip_unanswered: see `propeller.metrics.Ranking`.

    Raises:
        ConfigError: a loss that is unknown, or a `max_seqlen` without room for text.
    """

    name = "ranking"

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_seqlen: int,
        loss: str = "pointwise",
        skip_unanswered: bool = False,
    ):
        if max_seqlen < _MIN_SEQLEN:
            raise ConfigError(
                f"max_seqlen {max_seqlen} leaves no room for two texts: expected {_MIN_SEQLEN} or more."
            )
        super().__init__(tokenizer, max_seqlen=max_seqlen)
        self.loss = RankingLoss(loss).loss
        self.skip_unanswered = as_switch("skip_unanswered", skip_unanswered)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "max_seqlen": self.max_seqlen,
            "loss": self.loss,
            "skip_unanswered": self.skip_unanswered,
        }

    @property
    def num_outputs(self) -> int:
        """Size of the model's last axis: two logits point-wise, else the score."""
        return 2 if self.loss == "pointwise" else 1

    @property
    def pad_values(self) -> dict[str, int | float]:
        return {**super().pad_values, "label": PADDING}

    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Tokenises a batch.

        Returns:
            For each example `input_ids` and `token_type_ids` (int64 `[seq_len]`) and `num_tokens` (before
            it was cut); where it has them its `label`, `query` and `candidate` (see `Ranking`).

        Raises:
            DataError: a text is missing or none.
        """
        first, second = ([_text(raw, name) for raw in raws] for name in ("text_a", "text_b"))
        encodings = self.tokenizer.encode_batch(first, second, max_seqlen=self.max_seqlen)
        examples = []
        for raw, encoding in zip(raws, encodings, strict=True):
            example: dict[str, Any] = {
                "input_ids": encoding.input_ids,
                "token_type_ids": encoding.token_type_ids,
                "num_tokens": encoding.num_tokens,
            }
            for name, column in (("label", "label"), ("qid", "query"), ("candidate", "candidate")):
                if name in raw:
                    example[column] = raw[name]
            examples.append(example)
        return examples

    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """Turns `logits` (float `[rows, 2]` point-wise, else `[rows, 1]`) into answers.

        Returns:
            `{"score"}` for each row, point-wise with `"label"`: 1 where it is relevant, else 0.
        """
        logits = np.asarray(outputs["logits"], dtype=np.float64)
        if self.num_outputs == 1:
            return [{"score": score} for score in logits[:, 0].tolist()]
        # The second of a softmax of two: 1 / (1 + exp(-x)), without an overflow.
        scores = np.exp(-np.logaddexp(0, logits[:, 0] - logits[:, 1])).tolist()
        labels = (logits[:, 1] > logits[:, 0]).astype(int).tolist()
        return [{"score": score, "label": label} for score, label in zip(scores, labels, strict=True)]

    def read(self, path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
        return read_ranking(path, columns=columns)

    def parse(self, line: str) -> Raw:
        """Reads `query<TAB>candidate`."""
        cells = line.split("\t")
        if len(cells) != 2:
            raise DataError(f"expected text_a<TAB>text_b, found {len(cells)} cells")
        return dict(zip(("text_a", "text_b"), cells, strict=True))

    def format(self, raw: Raw, answer: Answer) -> str:
        """Writes the score."""
        return f"{answer['score']:.8g}"

    def metrics(self) -> dict[str, Metric]:
        ranking = Ranking(skip_unanswered=self.skip_unanswered)
        if self.num_outputs == 1:
            return {"ranking": ranking}
        return {"ranking": ranking, "acc": _RelevantAcc(), "f1": _RelevantF1()}

    @property
    def best_metric(self) -> str:
        return "mrr"


class _RelevantAcc(Acc):
    """Accuracy of the decision whether a candidate is relevant."""

    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        super().update(predictions, np.asarray(labels) > 0, features)


class _RelevantF1(F1):
    """F1 of the decision that a candidate is relevant."""

    def update(self, predictions: Mapping[str, Array], labels: Array, features: Mapping[str, Any]) -> None:
        super().update(predictions, np.asarray(labels) > 0, features)


def differ(labels: Sequence[int]) -> bool:
    """Whether there is an order to learn from candidates with these labels."""
    return len(set(labels)) > 1


def ranking_report(groups: Mapping[str, Groups]) -> str:
    """Describes sets of queries with candidates, a line for each.

    Raises:
        DataError: `train` or `dev` has no relevant candidate.
    """
    lines = []
    for name, found in groups.items():
        labels = found.labels()
        sizes = [len(group) for group in labels]
        unanswered = sum(not any(label > 0 for label in group) for group in labels)
        relevant = sum(label > 0 for group in labels for label in group)
        if not relevant and name in ("train", "dev"):
            raise DataError(
                f"The {name} set has no relevant candidate, one with a label above 0: there is nothing to "
                f"{'learn from' if name == 'train' else 'choose the best model by'}."
            )
        lines.append(
            f"{name}: {len(sizes)} queries, {sum(sizes)} rows, candidates a query: mean "
            f"{np.mean(sizes):.1f}, most {max(sizes)}; relevant: {relevant / sum(sizes):.1%}; queries "
            f"without a relevant candidate: {unanswered}"
        )
    return "\n".join(lines)


def _text(raw: Raw, name: str) -> str:
    text = raw.get(name)
    if not isinstance(text, str):
        found = f"{text!r:.80}" if name in raw else "missing"
        raise DataError(f"{name} is {found}; expected a string.")
    return text
