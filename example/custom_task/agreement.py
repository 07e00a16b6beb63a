"""A task of one's own: which share of its readers agrees with a text? No Paddle in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie.tasks.processor import TextProcessor
from propeller.data import Dataset, FeatureColumns, LabelColumn, RawColumn
from propeller.errors import DataError
from propeller.metrics import Metric, Pearson
from propeller.processor import Answer, Raw


class AgreementProcessor(TextProcessor):
    """Texts in, shares between 0 and 1 out."""

    name = "agreement"
    pair = False

    @property
    def settings(self) -> dict[str, Any]:
        """What `__init__` takes besides the tokenizer."""
        return {"max_seqlen": self.max_seqlen}

    def read(self, path: Path, *, columns: Sequence[str] | None = None) -> Dataset:
        """The rows of a file: `text_a<TAB>label`, with or without a header; the label is the share."""
        text = RawColumn("text_a", aliases=["text"])
        share = LabelColumn("label", dtype="float32", aliases=["share"])
        return FeatureColumns([text, share], file_columns=columns).read(path).map(_checked)

    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """What the model takes; an example that is to be answered has no label."""
        encodings = self.tokenizer.encode_batch([raw["text_a"] for raw in raws], max_seqlen=self.max_seqlen)
        return [
            {"input_ids": encoding.input_ids, "token_type_ids": encoding.token_type_ids}
            | ({"label": np.float32(raw["label"])} if "label" in raw else {})
            for raw, encoding in zip(raws, encodings, strict=True)
        ]

    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """An answer for each row of what the model gives."""
        return [{"share": float(share)} for share in outputs["share"]]

    def parse(self, line: str) -> Raw:
        """A line of `ernie predict`."""
        return {"text_a": line}

    def format(self, raw: Raw, answer: Answer) -> str:
        """The line that it writes."""
        return f"{answer['share']:.4f}"

    def metrics(self) -> dict[str, Metric]:
        """The first one chooses the best model."""
        return {"pearson": Pearson("share")}


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """An error in here names file and line by itself."""
    if not 0 <= row["label"] <= 1:
        raise DataError(f"got the share {row['label']}; expected text<TAB>share, a share between 0 and 1")
    return row
