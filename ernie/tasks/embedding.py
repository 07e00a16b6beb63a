"""Embeddings of sentences and sentence pairs, without Paddle."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie.tasks.pooling import PROMPTS, EmbeddingSettings
from ernie.tokenizing import Encoding, Tokenizer, library_versions, load_tokenizer
from propeller import atomic
from propeller.errors import DataError, did_you_mean
from propeller.metrics import Metric
from propeller.processor import Answer, Processor, Raw, register_processor

_KEYS = ("text_a", "text_b", "prompt")


@register_processor
class EmbeddingProcessor(Processor):
    """Texts and pairs in, embeddings out.

    Every string has an embedding: an empty one that of `[CLS] [SEP]`, a long one that of its first
    `max_seqlen` tokens; control characters such as NUL are dropped, a lone surrogate counts as U+FFFD.

    Args:
        tokenizer: the model's tokenizer.
        settings: how its embeddings are made.
    """

    name = "embedding"

    def __init__(self, tokenizer: Tokenizer, settings: EmbeddingSettings):
        self.tokenizer = tokenizer
        self.settings = settings
        self._prefixes: dict[str | None, str] = {
            None: settings.default_prefix,
            **{name: getattr(settings, f"{name}_prefix") for name in PROMPTS},
        }

    @property
    def pad_values(self) -> dict[str, int]:
        """What fills up shorter rows, where that is not 0."""
        return {"input_ids": self.tokenizer.pad_token_id}

    def prepare(self, raws: Sequence[Raw]) -> list[dict[str, Any]]:
        """Tokenises a batch.

        Args:
            raws: examples of `text_a`, for a pair `text_b`, and `prompt`: `query` or `passage` puts the
                model's text for that before `text_a`.

        Returns:
            For each example `input_ids` and `token_type_ids` (int64 `[seq_len]`) and `num_tokens` (before
            it was cut).

        Raises:
            DataError: an example lacks its text, has a value that is none, or a key that is not known.
        """
        first = list(map(self._first_text, raws))
        second = [raw.get("text_b") for raw in raws]
        encodings: dict[int, Encoding] = {}
        for is_pair in (False, True):
            places = [place for place, text in enumerate(second) if (text is not None) is is_pair]
            if places:  # a call costs as much as a text
                found = self.tokenizer.encode_batch(
                    [first[place] for place in places],
                    [str(second[place]) for place in places] if is_pair else None,
                    max_seqlen=self.settings.max_seqlen,
                )
                encodings.update(zip(places, found, strict=True))
        return [
            {
                "input_ids": encoding.input_ids,
                "token_type_ids": encoding.token_type_ids,
                "num_tokens": encoding.num_tokens,
            }
            for encoding in map(encodings.__getitem__, range(len(raws)))
        ]

    def _first_text(self, raw: Raw) -> str:
        """The checked `text_a` of an example, with its prefix."""
        for key in raw:
            if key not in _KEYS:
                near = did_you_mean(str(key), _KEYS)
                raise DataError(f"An example has a {key!r}.{near} Known are: {', '.join(_KEYS)}.")
        text, second, prompt = raw.get("text_a"), raw.get("text_b"), raw.get("prompt")
        if not isinstance(text, str):
            found = f"{text!r:.80}" if "text_a" in raw else "missing"
            raise DataError(f"text_a is {found}; expected a string.")
        if second is not None and not isinstance(second, str):
            raise DataError(f"text_b is {second!r:.80}; expected a string.")
        if prompt is not None and prompt not in PROMPTS:
            raise DataError(f"prompt is {prompt!r:.80}; expected {' or '.join(map(repr, PROMPTS))}.")
        return self._prefixes[prompt] + text

    def finish(self, outputs: Mapping[str, Any]) -> list[Answer]:
        """Turns `embeddings` (float `[rows, dimensions]`) into lists of numbers.

        Where all tokens' vectors are asked for (`[rows, seq_len, dimensions]`), `lengths` (int `[rows]`)
        says how many of them a row has.

        Returns:
            `{"embedding": [number, ...]}` for each row, with a list for each token where all are asked for.
        """
        embeddings = np.asarray(outputs["embeddings"], dtype=np.float32)
        if embeddings.ndim == 2:
            return [{"embedding": row} for row in embeddings.tolist()]
        lengths = np.asarray(outputs["lengths"]).tolist()
        return [{"embedding": row[:length].tolist()} for row, length in zip(embeddings, lengths, strict=True)]

    def parse(self, line: str) -> Raw:
        """Reads `text`, or `text_a<TAB>text_b` for a pair."""
        cells = line.split("\t")
        if len(cells) > 2:
            raise DataError(f"expected a text, or text_a<TAB>text_b, found {len(cells)} cells")
        return dict(zip(("text_a", "text_b"), cells, strict=False))

    def format(self, raw: Raw, answer: Answer) -> str:
        """Writes the numbers with blanks between; of several tokens' vectors, tabs between these."""
        rows = answer["embedding"]
        if not (rows and isinstance(rows[0], list)):
            rows = [rows]
        return "\t".join(" ".join(f"{value:.9g}" for value in row) for row in rows)

    def metrics(self) -> dict[str, Metric]:
        """None: there are no labels."""
        return {}

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the tokenizer; its fingerprint among the settings lets a client compare its own."""
        self.tokenizer.save_pretrained(folder)
        return {**dataclasses.asdict(self.settings), "tokenizer": self.tokenizer.fingerprint}

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> EmbeddingProcessor:
        return cls(load_tokenizer(folder), EmbeddingSettings.from_dict(settings))

    @property
    def fingerprint(self) -> str:
        tokens = [self.tokenizer.fingerprint, library_versions()]
        settings = [self.name, tokens, self.settings.max_seqlen, list(self._prefixes.values())]
        return hashlib.sha256(atomic.to_json(settings).encode("utf-8", "surrogatepass")).hexdigest()
