"""Features of texts as arrays on disk: a vector for each text, and one for each token, of any layers.

    cls_emb.npy          float32 [texts, H], of each text
    top_layer_emb.npy    float32 [tokens, H], the last layer, the texts' tokens one after the other
    layer_<n>_emb.npy    the same of layer n; 0 is what the embeddings give
    lengths.npy          int64 [texts], how many of these tokens each text has

A text that cannot be read has a vector of NaN and no tokens.
`np.split(top, np.cumsum(lengths)[:-1])` gives the tokens of each text. Special tokens count.

Source: `ernie_encoder.py` of the older ERNIE: the first two files are its own, without padding as there.
Shapes: B batch, S sequence length, H hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ernie.modeling import ErnieModel
from ernie.tasks.embedding import EmbeddingProcessor
from propeller import atomic
from propeller.data import pad_batch
from propeller.errors import ConfigError, DataError
from propeller.npy import NpyWriter
from propeller.paddle.runtime import paddle
from propeller.processor import Raw

# Batches that are sorted by length together. What they give is in memory at a time, and no more.
_CHUNK_BATCHES = 4


@dataclasses.dataclass(frozen=True)
class Features:
    """What the model gives for one text of S tokens.

    Attributes:
        vector: float32 `[H]`, of the text.
        layers: number of a layer -> float32 `[S, H]`.
    """

    vector: np.ndarray
    layers: dict[int, np.ndarray]


class Summary(NamedTuple):
    """What was written.

    Attributes:
        texts, tokens: so many.
        truncated: texts that were cut.
        errors: texts that could not be read.
    """

    texts: int
    tokens: int
    truncated: int
    errors: int


def layer_numbers(text: str, depth: int) -> list[int]:
    """Reads a list such as `1,-2`: 0 for the embeddings, 1 to `depth`, or from the end from -1 on.

    Raises:
        ConfigError: one of them is not there.
    """
    numbers = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        number = int(part) if part.removeprefix("-").isdecimal() else depth + 1
        if not -depth <= number <= depth:
            raise ConfigError(
                f"layer {part!r} is not there; the model has 0 (embeddings), 1 to {depth}, and -1 (the last) "
                f"to -{depth}."
            )
        numbers.append(number if number >= 0 else depth + 1 + number)
    return sorted(set(numbers))


class Extractor:
    """Texts to features.

    Args:
        model: the encoder, in evaluation mode.
        processor: the encoder's; its settings say how long a text may be, and how its vector is made:
            `pooler`, `cls`, `mean` or `max`.
        layers: numbers of the layers that are wanted besides the last.
        batch_size: texts that go through the model at a time.
    """

    def __init__(
        self, model: ErnieModel, processor: EmbeddingProcessor, *, layers: Sequence[int] = (), batch_size: int
    ):
        self.processor = processor
        self.hidden_size = model.config.hidden_size
        self.top = model.config.num_hidden_layers
        self.layers = sorted({*layers, self.top})
        self.batch_size = batch_size
        self._model = model

    def features(self, examples: Sequence[Mapping[str, Any]]) -> list[Features]:
        """Returns the features of prepared examples, in order."""
        found: dict[int, Features] = {}
        order = sorted(range(len(examples)), key=lambda place: len(examples[place]["input_ids"]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            found.update(zip(places, self._batch([examples[place] for place in places]), strict=True))
        return [found[place] for place in range(len(examples))]

    def _batch(self, examples: Sequence[Mapping[str, Any]]) -> Iterator[Features]:
        names = ("input_ids", "token_type_ids")
        batch = pad_batch(
            [{name: example[name] for name in names} for example in examples],
            pad_values=self.processor.pad_values,
        )
        lengths = [len(example["input_ids"]) for example in examples]
        # By length, for a text may hold the padding token itself.
        mask = np.arange(batch["input_ids"].shape[1]) < np.array(lengths)[:, None]
        with paddle.no_grad():
            output = self._model(
                *(paddle.to_tensor(batch[name]) for name in names),
                attention_mask=paddle.to_tensor(mask.astype(np.int64)),
                output_hidden=True,
            )
        layers = {number: output.hidden[number].numpy() for number in self.layers}
        pooled = output.pooled.numpy()
        for row, length in enumerate(lengths):
            own = {number: values[row, :length] for number, values in layers.items()}
            yield Features(self._vector(pooled[row], own[self.top]), own)

    def _vector(self, pooled: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        pooling = self.processor.settings.pooling
        if pooling == "pooler":
            return pooled
        if pooling == "cls":
            return tokens[0]
        return tokens.mean(axis=0) if pooling == "mean" else tokens.max(axis=0)


def write_features(raws: Iterable[Raw | DataError], extractor: Extractor, folder: Path) -> Summary:
    """Writes the features of texts, in bounded memory. Files appear whole, when there is no text left.

    Args:
        raws: `{"text_a", "text_b"?}` each; more in it does not matter. An error stands for a text that cannot
            be read.
        extractor: makes features of them.
        folder: made if it is not there.

    Raises:
        DataError: there is no text, or one is none.
    """
    names = {number: f"layer_{number}_emb" for number in extractor.layers} | {extractor.top: "top_layer_emb"}
    texts = tokens = truncated = errors = 0
    with contextlib.ExitStack() as stack:

        def opened(name: str, row_shape: Sequence[int], dtype: str = "<f4") -> NpyWriter:
            temporary = stack.enter_context(atomic.new_file(folder / f"{name}.npy"))
            return stack.enter_context(NpyWriter(temporary, row_shape, dtype))

        row = [extractor.hidden_size]
        vectors, lengths = opened("cls_emb", row), opened("lengths", [], "<i8")
        layers = {number: opened(name, row) for number, name in names.items()}
        iterator = iter(raws)
        while chunk := list(itertools.islice(iterator, _CHUNK_BATCHES * extractor.batch_size)):
            good = {place: raw for place, raw in enumerate(chunk) if not isinstance(raw, DataError)}
            examples = extractor.processor.prepare([_text_of(raw) for raw in good.values()])
            rows, sizes = np.full((len(chunk), *row), np.nan, "<f4"), np.zeros(len(chunk), np.int64)
            for place, example, found in zip(good, examples, extractor.features(examples), strict=True):
                rows[place], sizes[place] = found.vector, len(example["input_ids"])
                truncated += int(example["num_tokens"] > sizes[place])
                for number, writer in layers.items():
                    writer.write(found.layers[number])
            vectors.write(rows)
            lengths.write(sizes)
            texts, tokens = texts + len(chunk), tokens + int(sizes.sum())
            errors += len(chunk) - len(good)
        if not texts:
            raise DataError("there is no text; expected at least one line")
    return Summary(texts, tokens, truncated, errors)


def _text_of(raw: Raw) -> dict[str, Any]:
    return {name: raw[name] for name in ("text_a", "text_b") if name in raw}
