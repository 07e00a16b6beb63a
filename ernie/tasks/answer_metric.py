"""Metrics of tasks whose raw examples are judged as wholes, by the answers that users would get."""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from propeller import atomic
from propeller.errors import DataError
from propeller.metrics import Metric
from propeller.metrics.base import Array, state_array
from propeller.processor import Answer, Processor, Raw

_CHUNK = 512

Score = Callable[[Sequence[Raw], Sequence[Answer]], Mapping[str, float]]


def with_answer_columns(raw: Raw, examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds to the windows of a raw example the columns by which `AnswerMetric` knows them.

    They never reach the model: `raw`, JSON, in the first window only, since it may be long; `example`, the
    same in all; `window`, the place.
    """
    text = atomic.to_json(raw)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return [
        {**example, "raw": "" if place else text, "example": digest, "window": place}
        for place, example in enumerate(examples)
    ]


class AnswerMetric(Metric):
    """Joins the windows of every raw example to its answer, and scores all answers at the end.

    Reads the columns of `with_answer_columns`. What is kept is what `finish` makes of each window. The
    windows that `join` wants as well are made again: of CMRC2018's dev set that takes 0.5 s of one core,
    where their offsets alone would be 22 MB to keep, and to send between ranks at each evaluation.

    Args:
        processor: the task.
        score: what the answers to labelled raw examples are worth: values by name.
    """

    def __init__(self, processor: Processor, score: Score):
        self._processor = processor
        self._score = score
        self.reset()

    def reset(self) -> None:
        # By `example`: the raw one, and for each window its parts, several where the example stands in the
        # data more than once.
        self._raws: dict[str, str] = {}
        self._parts: dict[str, dict[int, list[Answer]]] = {}

    def update(self, predictions: Mapping[str, Array], labels: Any, features: Mapping[str, Any]) -> None:
        windows = np.asarray(features["window"]).tolist()
        parts = self._processor.finish(predictions)
        if len(parts) != len(windows):
            raise DataError(f"{len(parts)} parts of answers for {len(windows)} rows; expected one for each.")
        for raw, example, window, part in zip(
            features["raw"], features["example"], windows, parts, strict=True
        ):
            if raw:
                self._raws[example] = raw
            self._add(example, window, [part])

    def _add(self, example: str, window: int, parts: list[Answer]) -> None:
        self._parts.setdefault(example, collections.defaultdict(list))[window] += parts

    def compute(self) -> Mapping[str, float]:
        """The scores over all raw examples of which all windows were seen.

        The others, of an evaluation that ends early (`eval_max_steps`), do not count.
        """
        return self._score(*self.answers())

    def answers(self) -> tuple[list[Raw], list[Answer]]:
        """The raw examples of which all windows were seen, and the answers to them."""
        raws: list[Raw] = []
        answers: list[Answer] = []
        seen = iter(self._raws.items())
        while chunk := list(itertools.islice(seen, _CHUNK)):
            loaded = [json.loads(text) for _, text in chunk]
            windows = self._processor.windows(loaded)
            for raw, examples, (name, _) in zip(loaded, windows, chunk, strict=True):
                parts = [self._parts[name].get(window, []) for window in range(len(examples))]
                for chosen in zip(*parts, strict=False):
                    raws.append(raw)
                    answers.append(self._processor.join(raw, examples, chosen))
        return raws, answers

    def state(self) -> dict[str, Array]:
        text = atomic.to_json([self._raws, self._parts]).encode("utf-8", "surrogatepass")
        return {"answers": np.frombuffer(text, dtype=np.uint8)}

    def merge(self, state: Mapping[str, Array]) -> None:
        text = state_array(state, "answers").tobytes().decode("utf-8", "surrogatepass")
        raws, parts = json.loads(text)
        self._raws |= raws
        for example, windows in parts.items():
            for window, found in windows.items():
                self._add(example, int(window), found)
