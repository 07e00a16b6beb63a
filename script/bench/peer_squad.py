"""SQuAD 2.0 for the reference side: halves by article, windows by Transformers' tokenizer.

It is written without the project, as a second opinion: only `peer_transformers.py` imports it. Source of the
windows: `run_qa.py` of Transformers' examples, with BERT's meaning of `doc_stride`.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peer_tasks import Features, Prepared
from transformers import BertForQuestionAnswering

SPECIAL_TOKENS = 3


@dataclass(frozen=True)
class QuestionTask:
    """Reading comprehension over one file, of which every other article is for dev.

    Attributes:
        halves: where the halves are written, `train.json` and `dev.json`, for both sides.
        doc_stride: tokens of the context from one window to the next.
        max_articles: articles of each half.
    """

    halves: Path
    file: str = "cs224n_dev-v2.0.json.gz"
    num_epochs: int = 1
    max_seqlen: int = 256
    doc_stride: int = 128
    max_articles: int | None = None

    model_class = BertForQuestionAnswering
    head = "qa_outputs"
    num_labels = 2

    def prepare(self, data: Path, tokenizer: Any) -> Prepared:
        """Writes the halves, and tokenises them.

        Batches hold windows of one length: `BertForQuestionAnswering` lets an answer begin in the padding,
        so that otherwise the loss of a window depends on its neighbours.
        """
        with gzip.open(data / self.file, "rt", encoding="utf-8") as file:
            content = json.load(file)
        sides = []
        for name, first in (("train", 0), ("dev", 1)):
            articles = content["data"][first::2][: self.max_articles]
            text = json.dumps({**content, "data": articles})
            (self.halves / f"{name}.json").write_text(text, encoding="utf-8")
            sides.append(self._features(articles, tokenizer))
        return Prepared(*sides, score=lambda logits: {}, by_length=True)

    def _features(self, articles: list[dict[str, Any]], tokenizer: Any) -> Features:
        return [
            window
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
            for window in self._windows(question, paragraph["context"], tokenizer)
        ]

    def _windows(self, question: dict[str, Any], context: str, tokenizer: Any) -> Features:
        asked = len(tokenizer(question["question"], add_special_tokens=False)["input_ids"])
        room = self.max_seqlen - asked - SPECIAL_TOKENS
        encoded = tokenizer(
            question["question"],
            context,
            truncation="only_second",
            max_length=self.max_seqlen,
            stride=max(0, room - self.doc_stride),
            return_overflowing_tokens=True,
        )
        windows = []
        for number in range(len(encoded["input_ids"])):
            first = last = None
            if question["answers"]:
                answer = question["answers"][0]
                begin, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                first = encoded.char_to_token(number, begin, sequence_index=1)
                last = encoded.char_to_token(number, end - 1, sequence_index=1)
            is_inside = first is not None and last is not None
            window = {
                name: encoded[name][number] for name in ("input_ids", "token_type_ids", "attention_mask")
            }
            window["start_positions"], window["end_positions"] = (first, last) if is_inside else (0, 0)
            windows.append(window)
        return windows


def joined_logits(predictions: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The logits of start and end of all windows, float32 [windows, 2, longest]."""
    return np.stack(predictions, axis=1).astype(np.float32)
