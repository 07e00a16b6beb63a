"""Training of embeddings for retrieval, by queries with passages that are right for them or wrong. No Paddle.

What is exported is a bundle of embeddings like any other; see `ernie.tasks.embedding`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie.config import ErnieConfig
from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.groups import PADDING, Groups
from ernie.tasks.pooling import EmbeddingSettings, EncoderOptions, FolderSettings, read_folder, resolve
from ernie.tasks.processor import TextProcessor
from ernie.tasks.ranking_files import read_pairs
from ernie.tokenizing import Tokenizer, load_tokenizer
from propeller.data import Dataset
from propeller.errors import ConfigError, DataError
from propeller.metrics import Metric, Retrieval
from propeller.processor import Answer, Raw
from propeller.types import HParams, HParamsGroup, as_switch

QUERY, RIGHT, WRONG = Retrieval.QUERY, 1, 0
"""The labels of rows: a query, a passage that is right for it, one that is not."""

ENCODER_KEYS = ("encode_layer", "pooling", "normalize", "dimensions", "query_prefix", "passage_prefix")
"""Hyper-parameters that say how embeddings are made; see `EncoderOptions`."""

CANDIDATES = ("all", "given")


@dataclasses.dataclass(frozen=True)
class RetrievalLoss(HParamsGroup):
    """What a dual encoder learns from, as hyper-parameters name it.

    Attributes:
        scale: what similarities are multiplied by before the softmax.
        symmetric: whether passages look for their queries as well; then the loss is the mean of both ways.

    Raises:
        ConfigError: a value that cannot be used.
    """

    scale: float = 20.0
    symmetric: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_above_0("scale")


class DualEncoderProcessor(TextProcessor):
    """Queries with passages in, a row for each text out. Its bundles are those of an `EmbeddingProcessor`.

    Args:
        tokenizer: the model's tokenizer.
        embedding: how embeddings are made.
        candidates: what an evaluation ranks for a query: `all` passages of the set, or those `given` with it.

    Raises:
        ConfigError: embeddings of each token, or an unknown kind of candidates.
    """

    # A bundle names its processor by this: what it serves is embeddings of any texts.
    name = EmbeddingProcessor.name
    label_names = ("label", "group", "query", "text")

    def __init__(self, tokenizer: Tokenizer, embedding: EmbeddingSettings, *, candidates: str = "all"):
        if embedding.pooling == "none":
            raise ConfigError("pooling 'none' gives no single embedding to compare; take mean, cls or max.")
        if candidates not in CANDIDATES:
            raise ConfigError(f"candidates is {candidates!r}; there are: {', '.join(CANDIDATES)}.")
        super().__init__(tokenizer, max_seqlen=embedding.max_seqlen)
        self.embedding = embedding
        self.candidates = candidates
        self._served = EmbeddingProcessor(tokenizer, embedding)

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self.embedding)

    @property
    def pad_values(self) -> dict[str, int | float]:
        return {**super().pad_values, "label": PADDING}

    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Tokenises queries and passages, each with the model's text for its kind before it.

        Args:
            raws: `text_a` and the lists `positives` and `negatives`; see `read_pairs`.

        Returns:
            Of each the query and then its passages, with `label`, `candidate` (the place among them, from
            0), and `query` and `text`, which stand for the text of the query and the own one.

        Raises:
            DataError: a text is missing or none.
        """
        texts: list[dict[str, Any]] = []
        columns: list[dict[str, Any]] = []
        for raw in raws:
            labels = [QUERY, *[RIGHT] * len(raw["positives"]), *[WRONG] * len(raw["negatives"])]
            members = [raw["text_a"], *raw["positives"], *raw["negatives"]]
            query = _number_of(members[0])
            for place, (text, label) in enumerate(zip(members, labels, strict=True)):
                texts.append({"text_a": text, "prompt": "query" if label == QUERY else "passage"})
                columns.append({"label": label, "candidate": place, "query": query, "text": _number_of(text)})
        examples = self._served.prepare(texts)
        return [{**example, **more} for example, more in zip(examples, columns, strict=True)]

    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """As `EmbeddingProcessor.finish`."""
        return self._served.finish(outputs)

    def read(self, path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
        return read_pairs(path, columns=columns)

    def parse(self, line: str) -> Raw:
        """As `EmbeddingProcessor.parse`."""
        return self._served.parse(line)

    def format(self, raw: Raw, answer: Answer) -> str:
        """As `EmbeddingProcessor.format`."""
        return self._served.format(raw, answer)

    def metrics(self) -> dict[str, Metric]:
        return {"retrieval": Retrieval(given=self.candidates == "given")}

    @property
    def best_metric(self) -> str:
        return "mrr"

    def save(self, folder: Path) -> dict[str, Any]:
        return self._served.save(folder)

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> DualEncoderProcessor:
        return cls(load_tokenizer(folder), EmbeddingSettings.from_dict(settings))


def embedding_settings(
    folder: str | Path | None, config: ErnieConfig, hparams: HParams, *, max_seqlen: int
) -> EmbeddingSettings:
    """How embeddings are to be made: as hyper-parameters say, else as the pretrained folder, else the mean.

    Unless hyper-parameters say otherwise they get length 1, so that their product is the cosine; but not
    where the folder's makers compare by the product alone.

    Args:
        folder: the pretrained folder, where there is one.
        config: the encoder's.
        hparams: see `ENCODER_KEYS`.
        max_seqlen: tokens of a text at most.

    Raises:
        ConfigError: something is asked for that the model does not have, or a value that cannot be used.
    """
    found = FolderSettings(encoder=Path()) if folder is None else read_folder(folder)
    asked = {key: hparams[key] for key in ENCODER_KEYS if hparams.get(key) is not None}
    for key in ("encode_layer", "pooling", "query_prefix", "passage_prefix"):
        if not isinstance(asked.get(key, ""), str):
            raise ConfigError(f"{key} must be text, got {asked[key]!r}.")
    if found.pooling is None and asked.get("encode_layer") != "pooler":
        asked.setdefault("pooling", "mean")
    normalize = as_switch("normalize", asked.pop("normalize", found.normalize or found.similarity != "dot"))
    options = EncoderOptions(**asked, normalize=normalize, max_seqlen=max_seqlen)
    resolved = resolve(options, found, config)
    return dataclasses.replace(resolved, similarity="cosine" if normalize else "dot")


def is_answered(labels: Sequence[int]) -> bool:
    """Whether there is a right passage among passages with these labels."""
    return RIGHT in labels


def retrieval_report(groups: Mapping[str, Groups]) -> str:
    """Describes sets of queries with passages, a line for each.

    Raises:
        DataError: a set has no right passage.
    """
    lines = []
    for name, found in groups.items():
        labels = found.labels()
        right, wrong = (sum(group.count(label) for group in labels) for label in (RIGHT, WRONG))
        unanswered = sum(not is_answered(group) for group in labels)
        if unanswered == len(labels):
            raise DataError(f"The {name} set has no right passage for any query.")
        lines.append(
            f"{name}: {len(labels)} queries, {right} right passages, {wrong} hard negatives, a query at most "
            f"{max(map(len, labels)) - 1}, mean {np.mean([len(group) - 1 for group in labels]):.1f}; queries "
            f"without a right passage: {unanswered}"
        )
    return "\n".join(lines)


def _number_of(text: Any) -> int:
    """A number that stands for a text: of 63 bits, so that no two of a data set share one."""
    if not isinstance(text, str):
        raise DataError(f"a text is {text!r:.80}; expected a string.")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
